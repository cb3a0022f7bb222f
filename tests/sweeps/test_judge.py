"""A winner is named after its settings were tried again, and a difference that seeds could make is called so."""

import json
import math

import pytest
from pydantic import ValidationError

from inflora.config import ConfigError
from inflora.metrics import spread
from inflora.runs import train_into
from sweeps.engine.after.final import plan
from sweeps.engine.after.judge import FIRST, candidates, compare, estimate, judge, judged_orders, score, write_judgement
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.run.trial import learn
from sweeps.engine.space.domains import Real
from sweeps.engine.space.estimate import estimate as estimated
from sweeps.engine.space.spec import Sweep

from .conftest import PAPER, learn_all
from .test_trial import MemorySession, settings_of


def test_the_interval_is_students():
    # t(0.975, 2) = 4.302653, s = 1
    assert estimate([1.0, 2.0, 3.0]) == pytest.approx(
        (2.0, 2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3), 3)
    )
    assert estimate([1.0])[1:3] == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([0.80, 0.70, 0.90], [0.75, 0.66, 0.84], "better"),
        ([0.75, 0.66, 0.84], [0.80, 0.70, 0.90], "worse"),
        ([0.80, 0.70, 0.90], [0.75, 0.75, 0.86], "within seed noise"),
        ([0.8, 0.7], [0.8, 0.7], "within seed noise"),
        ([0.8], [0.1], "one run each: nothing can be said"),
    ],
)
def test_runs_are_compared_pair_by_pair(ours, theirs, verdict):
    assert compare(ours, theirs).verdict == verdict


def test_the_first_setting_is_judged_beside_the_best_trials_and_never_twice(tiny_sweep, tmp_path):
    ledger = Ledger(tiny_sweep.model_copy(update={"early_stopping": "none"}), tmp_path)
    for accuracy in (0.9, 0.7, 0.8):
        learn_all(ledger, ledger.propose().number, [accuracy] * 5)
    assert list(candidates(tiny_sweep, ledger.records(), None, top=2)) == ["trial-2", FIRST]
    assert list(candidates(tiny_sweep, ledger.records(), None, top=3)) == ["trial-2", "trial-1", FIRST]
    with pytest.raises(ConfigError, match="none to judge"):
        candidates(tiny_sweep, [], None, top=2)


def test_those_are_judged_whose_estimates_are_best_not_the_luckiest(tiny_sweep, tmp_path):
    changes = {"early_stopping": "none", "sampler": "random", "trials": 30, "first": ()}
    ledger = Ledger(with_changes(tiny_sweep, **changes), tmp_path)
    for _ in range(29):
        proposal = ledger.propose()
        learn_all(ledger, proposal.number, [0.8 - 0.02 * abs(proposal.settings["adapter.rank"] - 10)] * 5)
    lucky = ledger.propose()
    learn_all(ledger, lucky.number, [0.81] * 5)
    known = estimated(ledger.sweep, ledger.records())
    assert next(iter(candidates(ledger.sweep, ledger.records(), None, top=1))) == f"trial-{lucky.number}"
    expected = [f"trial-{record.number}" for record in known.ranking()[:3]]
    assert list(candidates(ledger.sweep, ledger.records(), known, top=3)) == expected


def test_judging_trains_on_train_over_the_same_seeds_and_orders_and_names_the_best_mean(tiny_sweep, tmp_path):
    configs = {"trial-1": tiny_sweep.config(PAPER | {"optim.lr": 5e-3}), FIRST: tiny_sweep.config(PAPER)}
    runs = plan(configs, [0], tmp_path, orders=[1, 2], evaluate_on="validation")
    states = [train_into(run.folder, run.config, run.evaluate_on, resume=True) for run in runs]
    assert {state.evaluate_on for state in states} == {"validation"}
    winner, estimates, comparisons = judge(runs, "acc/final")
    scores = [score(state, "acc/final") for state in states]
    assert estimates["trial-1"].mean == pytest.approx(sum(scores[:2]) / 2)
    assert winner == max(estimates, key=lambda label: estimates[label].mean)
    assert comparisons["trial-1"].difference.mean == pytest.approx((scores[0] - scores[2] + scores[1] - scores[3]) / 2)
    text = write_judgement(tiny_sweep, winner, estimates, comparisons, [1, 2], tmp_path)
    assert "class orders: 1, 2; protocol end-of-training" in text
    assert "Each seed draws validation images of its own, the same for all candidates." in text
    assert json.loads((tmp_path / "judged.json").read_text())["winner"] == winner


def test_every_seed_is_judged_on_images_of_its_own_and_no_trial_s(tiny_sweep, tmp_path):
    configs = {"one": tiny_sweep.config(PAPER), "two": tiny_sweep.config(PAPER | {"optim.lr": 5e-3})}
    runs = plan(configs, [0, 1], tmp_path, evaluate_on="validation")
    splits = {label: [r.config.data.split_seed for r in runs if r.label == label] for label in configs}
    base = tiny_sweep.base.data.split_seed
    assert splits["one"] == splits["two"] == [base + 1, base + 2], "paired, and none that the winner was picked on"
    assert {run.config.data.split_seed for run in plan(configs, [0, 1], tmp_path)} == {base}


def test_an_order_to_judge_on_takes_the_place_of_a_named_one_and_none_keeps_it(tiny_sweep, tmp_path):
    config = tiny_sweep.config({"data.order": "pycil-1993"})
    runs = plan({"one": config}, [0], tmp_path, orders=[1, None], evaluate_on="validation")
    assert [(run.config.data.order_seed, run.config.data.order) for run in runs] == [(1, None), (None, "pycil-1993")]
    assert len({run.folder for run in runs}) == 2


def test_one_run_has_no_interval_and_decides_nothing(tiny_sweep, tmp_path):
    estimates = {"trial-1": estimate([0.5]), FIRST: estimate([0.4])}
    text = write_judgement(tiny_sweep, "trial-1", estimates, {"trial-1": compare([0.5], [0.4])}, [None], tmp_path)
    assert "| trial-1 | 50.0 | none | one run each: nothing can be said: +10.0 |" in text

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    facts = json.loads((tmp_path / "judged.json").read_text(), parse_constant=refuse)
    assert facts["estimates"]["trial-1"] == {"mean": 0.5, "low": None, "high": None, "runs": 1}


def with_changes(sweep, **changes) -> Sweep:
    return Sweep.model_validate({**sweep.model_dump(), **changes})


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"protocol": "first-task"}, "first-task cannot choose adapter.energy"),
        ({"protocol": "two-phase"}, "needs judge_orders"),
        ({"protocol": "current-task"}, "judged by objective acc/current"),
        ({"judge_orders": (None,)}, "judge_orders"),
        ({"protocol": "last-task"}, "protocol"),
    ],
)
def test_a_protocol_that_cannot_be_followed_is_refused(tiny_sweep, change, rule):
    with pytest.raises(ValidationError, match=rule):
        with_changes(tiny_sweep, **change)


def test_a_two_phase_sweep_is_not_judged_on_the_order_it_has_learnt(tiny_sweep):
    sweep = with_changes(tiny_sweep, protocol="two-phase", judge_orders=(7, 8))
    assert judged_orders(sweep, []) == [7, 8]
    learnt = sweep.model_copy(update={"base": sweep.config({"data.order_seed": 9})})
    with pytest.raises(ConfigError, match="no trial has learnt, got 9"):
        judged_orders(learnt, [9])
    assert judged_orders(tiny_sweep, []) == [None]


def test_another_protocol_is_another_study(tiny_sweep):
    space = {"optim.lr": Real(low=1e-4, high=1e-2)}
    plain = with_changes(tiny_sweep, space=space, first=())
    assert with_changes(plain, protocol="first-task").study_name != plain.study_name


def test_choosing_by_the_first_task_learns_no_other(tiny_sweep):
    session = MemorySession()
    learn(settings_of(tiny_sweep.base, tasks=1), session)
    (only,) = session.reports
    assert (only.tasks_done, only.tasks) == (1, 1)
    assert only.metrics["acc/final"] == only.metrics["acc/new"]


def test_one_run_has_a_mean_and_no_spread():
    assert spread([0.5]) == (0.5, None)
    assert spread([0.4, 0.6]) == pytest.approx((0.5, math.sqrt(0.02)))
