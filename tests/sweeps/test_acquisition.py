"""Where the default sampler looks next."""

import numpy as np
import pytest

from inflora.config import ConfigError
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.space import domains, samplers
from sweeps.engine.space.acquisition import FIRST_LOOKS, Looks, most_promising, next_settings
from sweeps.engine.space.cube import encoded, point_of, settings_at
from sweeps.engine.space.domains import Choice, Integer, NearOne, Real
from sweeps.engine.space.gaussian_process import spread_points
from sweeps.engine.space.spec import SPEC_FILE, Constraint, read_sweep
from tests.sweeps.conftest import learn_all
from tests.sweeps.test_search import ADAPTERS, with_changes

SPACE = {
    "adapter.rank": Integer(low=4, high=64, log=True),
    "adapter.energy": NearOne(low=0.9, high=0.9999),
    "optim.lr": Real(low=5e-4, high=2e-2, log=True),
}
TOP = np.array([0.7, 0.3, 0.6])


def score(settings, noise=0.0):
    """A broad top in the middle of nowhere."""
    return 0.8 - 0.4 * float(((point_of(SPACE, settings) - TOP) ** 2).sum()) + noise


def searched(trials: int, seed: int, noise: float = 0.02) -> list:
    random = np.random.default_rng(seed)
    finished = []
    for number in range(trials):
        settings = next_settings(SPACE, Looks(finished, number=number, seed=seed))
        finished.append((settings, score(settings, random.normal(0, noise))))
    return finished


def test_it_comes_nearer_to_the_top_than_chance():
    ours = [np.mean([score(settings) for settings, _ in searched(16, seed)[-6:]]) for seed in range(6)]
    chance = np.mean([score(settings_at(SPACE, point)) for point in spread_points(500, 3)])
    assert np.mean(ours) > chance + 0.07


def test_all_it_proposes_lies_in_the_space_and_is_a_function_of_what_is_known():
    assert searched(12, 3) == searched(12, 3) != searched(12, 4)
    assert all(domains.contains(SPACE, settings) for settings, _ in searched(12, 5))


def test_a_first_batch_is_spread_evenly():
    """Trials that start at once, before any has finished, are no nearer to each other than evenly spread points are."""
    batch = []
    for number in range(24):
        batch.append(next_settings(SPACE, Looks([], batch, number=number)))
    points = encoded(SPACE, batch)
    apart = np.sqrt(((points[:, None] - points) ** 2).sum(2)) + 9 * np.eye(24)
    chance = [np.random.default_rng(seed).random((24, 3)) for seed in range(50)]
    by_chance = np.mean([(np.sqrt(((p[:, None] - p) ** 2).sum(2)) + 9 * np.eye(24)).min() for p in chance])
    assert apart.min() > 1.5 * by_chance


def test_trials_at_a_time_keep_their_distance():
    finished = searched(FIRST_LOOKS + 3, 0)
    running = []
    for _ in range(3):
        running.append(next_settings(SPACE, Looks(finished, running, number=len(finished) + len(running))))
    points = encoded(SPACE, running)
    assert all(np.abs(points[a] - points[b]).max() > 0.02 for a in range(3) for b in range(a))


def test_a_setting_that_failed_is_not_proposed_again_and_again():
    finished, failed = searched(FIRST_LOOKS + 1, 1), []
    for _ in range(6):
        failed.append(next_settings(SPACE, Looks(finished, failed=failed, number=len(finished) + len(failed))))
    points = encoded(SPACE, failed)
    assert np.abs(points[:, None] - points).max(2)[np.triu_indices(6, 1)].min() > 0.02


def test_a_failure_counts_as_the_worst_and_not_as_unknown():
    finished = [(settings_at(SPACE, np.array([x, 0.5, 0.5])), 0.6 + 0.2 * x) for x in (0.1, 0.3, 0.5, 0.7)]
    bold, tried = (settings_at(SPACE, np.array([x, 0.5, 0.5])) for x in (0.9, 0.7))
    assert most_promising(SPACE, Looks(finished), [bold, tried]) == 0
    near = [settings_at(SPACE, np.array([x, 0.5, 0.5])) for x in (0.86, 0.9, 0.94)]
    assert most_promising(SPACE, Looks(finished, failed=near), [bold, tried]) == 1


def test_choices_are_told_apart():
    space = SPACE | {"classifier.name": Choice(options=("lda", "ranpac", "ncm"))}
    finished = []
    for number in range(14):
        settings = next_settings(space, Looks(finished, number=number, seed=2))
        finished.append((settings, 0.7 + 0.1 * (settings["classifier.name"] == "ranpac")))
    last = [settings["classifier.name"] for settings, _ in finished[-5:]]
    assert last.count("ranpac") >= 4


def test_what_learns_from_finished_trials_only_is_not_started_together_with_early_stopping(tiny_sweep, tmp_path):
    for sampler in ("gp", "cmaes"):
        older = with_changes(tiny_sweep, sampler=sampler, early_stopping="asha")
        with pytest.raises(ConfigError, match=f"sampler {sampler} learns from finished trials only"):
            older.extreme_configs()
        with_changes(tiny_sweep, sampler=sampler, early_stopping="none").extreme_configs()
        (tmp_path / SPEC_FILE).write_text(older.model_dump_json())
        assert read_sweep(tmp_path) == older, "a sweep of before is still read"


def test_where_the_process_knows_nothing_of_what_is_asked_tpe_proposes(tiny_sweep, tmp_path, monkeypatch):
    never = {"sampler": "gp", "early_stopping": "none", "trials": 3}
    changes = (
        {"space": ADAPTERS, "first": ()},
        {"tradeoffs": ("forgetting",)},
        {"constraints": (Constraint(metric="params/trainable", at_most=9e9),)},
    )
    monkeypatch.setattr(samplers, "next_settings", None)
    for place, change in enumerate(changes):
        sweep = with_changes(tiny_sweep, **never, **change)
        assert sweep.gp_falls_back
        assert Ledger(sweep, tmp_path / str(place)).propose() is not None
    assert not with_changes(tiny_sweep, **never).gp_falls_back


def test_a_killed_sweep_proposes_what_it_would_have(tiny_sweep, tmp_path):
    sweep = with_changes(tiny_sweep, sampler="gp", early_stopping="none", trials=10)

    def proposals(folder, restarts):
        seen, ledger = [], Ledger(sweep, folder)
        for number in range(10):
            if number in restarts:
                ledger = Ledger(sweep, folder)
            proposal = ledger.propose()
            seen.append(proposal.settings)
            learn_all(ledger, proposal.number, [0.5 + (7 * number % 5) / 50] * 5)
        return seen

    assert proposals(tmp_path / "whole", ()) == proposals(tmp_path / "killed", (2, 6, 7))
