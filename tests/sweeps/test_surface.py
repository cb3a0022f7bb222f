"""Pictures of the score over the space show what there is, with the doubt that there is."""

import numpy as np
import pytest

from sweeps.engine.show.scales import place, places, ticks
from sweeps.engine.show.surface import by_importance, curve_figures, curves, importance_figure, pair_figures
from sweeps.engine.space.cube import settings_at
from sweeps.engine.space.domains import Choice, Integer, NearOne, Real
from sweeps.engine.space.estimate import estimate
from sweeps.engine.space.gaussian_process import spread_points

from .test_estimate import CONDITIONAL, DOMAINS, Planted, finished


def values_at(domain):
    return [float(each) for each in ticks(domain).values()]


@pytest.mark.parametrize(
    ("domain", "shown"),
    [
        (Real(low=1e-4, high=1e-2, log=True), [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]),
        (Integer(low=4, high=64, log=True), [5, 10, 20, 50]),
        (NearOne(low=0.9, high=0.9999), [0.9, 0.99, 0.999, 0.9999]),
        (Real(low=-1.0, high=2.0), [-1, 0, 1, 2]),
        (Integer(low=3, high=3), [3]),
    ],
)
def test_round_numbers_stand_beside_a_picture(domain, shown):
    assert sorted(values_at(domain)) == pytest.approx(shown)


@pytest.mark.parametrize("domain", DOMAINS, ids=repr)
def test_numbers_stand_where_their_values_lie(domain):
    told = ticks(domain)
    assert 1 <= len(told) <= 6
    for at, text in told.items():
        assert 0 <= at <= 1
        assert at == pytest.approx(place(domain, float(text)), abs=0.01)


def test_trials_with_one_option_stand_side_by_side_within_its_place():
    domain = Choice(options=("a", "b"))
    assert places(domain, 9) == [0.25, 0.75]
    at = [place(domain, "b", number) for number in range(20)]
    assert len(set(at)) == 20
    assert 0.5 < min(at) <= max(at) < 1


def test_a_curve_s_band_holds_the_truth_and_what_matters_is_first(tiny_sweep):
    sweep = tiny_sweep

    def truth(settings):
        rank, energy, rate = (sweep.space[path].share_of(settings[path]) for path in sweep.space)
        return 0.8 - 0.3 * (rate - 0.4) ** 2 - 0.1 * (energy - 0.6) ** 2 + 0 * rank

    rng = np.random.default_rng(0)
    several = [settings_at(sweep.space, point) for point in rng.random((40, 3))]
    trials = [finished(i, each, truth(each) + 0.01 * rng.standard_normal()) for i, each in enumerate(several)]
    known = estimate(sweep, trials)
    told = curves(known)
    assert by_importance(told) == ["optim.lr", "adapter.energy", "adapter.rank"]
    others = [settings_at(sweep.space, point) for point in spread_points(200, 3)]
    for path, curve in told.items():
        along = [sweep.space[path].at(at) for at in curve.places_G]
        real_G = np.array([np.mean([truth({**each, path: value}) for each in others]) for value in along])
        assert np.mean((curve.low_G <= real_G) & (real_G <= curve.high_G)) > 0.8
        assert 0 <= curve.share.low <= curve.share.mean <= curve.share.high <= 1
    again = curves(known)
    assert all((again[path].mean_G == told[path].mean_G).all() for path in told), "the same page every time"
    assert len(list(curve_figures(known, told))) == 3
    assert list(importance_figure(told).data[0].y) == by_importance(told)[::-1]


def test_pairs_show_trials_and_leave_out_what_does_not_exist(tiny_sweep):
    sweep = tiny_sweep.model_copy(update={"space": CONDITIONAL})
    known = estimate(sweep, Planted(sweep, 0).trials(20))
    pairs = pair_figures(known, list(CONDITIONAL))
    names = {(figure.layout.xaxis.title.text, figure.layout.yaxis.title.text): figure for figure in pairs.figures}
    assert ("classifier.shrinkage", "classifier.features") not in names, "never both"
    surface, trials = names["classifier.name", "classifier.shrinkage"].data
    shown = np.array(surface.z, dtype=float)
    assert np.isnan(shown[:, 2]).all(), "ranpac shrinks nothing"
    assert pairs.low <= np.nanmin(shown) <= np.nanmax(shown) <= pairs.high
    assert len(trials.x) == sum("classifier.shrinkage" in record.settings for record in known.finished)
    assert sum(symbol == "star" for symbol in names["classifier.name", "adapter.merge"].data[1].marker.symbol) == 1
