"""How settings are searched: samplers and early stopping by name, conditions, several objectives, constraints."""

import pytest
from pydantic import ValidationError

from inflora.config import ConfigError
from sweeps.engine.ledger import ledger as ledger_module
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.records import Outcome, best_record
from sweeps.engine.ledger.study import load_study, pareto_front
from sweeps.engine.run.tune import StopWhenOver, StudySearcher
from sweeps.engine.space import domains
from sweeps.engine.space.domains import Choice, Integer, NearOne, Real
from sweeps.engine.space.spec import Sweep

from .conftest import PAPER, Anywhere, learn_all, report

ADAPTERS = {
    "adapter.name": Choice(options=("inflora", "lora", "none")),
    "adapter.rank": Integer(low=1, high=16, when={"adapter.name": ("inflora", "lora")}),
    "adapter.memory": Choice(options=("gpm", "dualgpm"), when={"adapter.name": ("inflora",)}),
    "adapter.energy": NearOne(low=0.8, high=0.99, when={"adapter.memory": ("dualgpm",)}),
    "optim.lr": Real(low=1e-4, high=1e-2, log=True),
}


def with_changes(sweep, **changes) -> Sweep:
    return Sweep.model_validate({**sweep.model_dump(), **changes})


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", "random", "grid"])
@pytest.mark.parametrize("conditional", [False, True])
def test_every_sampler_proposes_within_the_space_no_setting_twice_and_goes_on_after_a_restart(
    tiny_sweep, tmp_path, sampler, conditional
):
    changes = {"space": ADAPTERS, "first": ()} if conditional else {}
    sweep = with_changes(tiny_sweep, sampler=sampler, early_stopping="none", trials=8, **changes)
    seen = []
    for _ in range(2):
        ledger = Ledger(sweep, tmp_path)
        for _ in range(4):
            proposal = ledger.propose()
            assert domains.contains(sweep.space, proposal.settings)
            sweep.config(proposal.settings)
            seen.append(repr(proposal.settings))
            learn_all(ledger, proposal.number, [0.5 + len(seen) / 100] * 5)
    assert len(set(seen)) == len(seen) == 8
    assert ledger.remaining() == 0


def test_the_first_trials_come_before_those_of_the_grid_which_are_tried_once_and_then_end(tiny_sweep, tmp_path):
    small = {"adapter.memory": Choice(options=("gpm", "dualgpm")), "adapter.rank": Integer(low=2, high=8)}
    first = {"adapter.memory": "gpm", "adapter.rank": 3}
    sweep = with_changes(tiny_sweep, sampler="grid", grid_points=2, trials=99, space=small, first=(first,))
    ledger = Ledger(sweep, tmp_path)
    proposed = []
    while (proposal := ledger.propose()) is not None:
        proposed.append(tuple(proposal.settings.values()))
        learn_all(ledger, proposal.number, [0.9] * 5)
    assert proposed == [("gpm", 3), ("gpm", 2), ("gpm", 8), ("dualgpm", 2), ("dualgpm", 8)]
    assert ledger.why_over() == "every setting of the space has been tried"


FOUR = {"adapter.memory": Choice(options=("gpm", "dualgpm")), "adapter.rank": Integer(low=7, high=8)}


@pytest.mark.parametrize("sampler", ["grid", "random"])
def test_a_space_that_has_been_tried_is_over_when_its_last_trials_are_also_after_a_restart(
    tiny_sweep, tmp_path, sampler
):
    sweep = with_changes(tiny_sweep, sampler=sampler, trials=9, space=FOUR, first=())
    for _ in range(2):
        ledger = Ledger(sweep, tmp_path)
        searcher, ends = StudySearcher(ledger, Anywhere()), StopWhenOver(ledger)
        asked = [searcher.suggest(str(slot)) for slot in range(5)]
        assert [each and each["number"] for each in asked][-1] is None
        assert not ends.stop_all(), "four trials run"
    for number in [each["number"] for each in asked[:4]]:
        assert not ends.stop_all()
        learn_all(ledger, number, [0.9] * 5)
    assert searcher.suggest("6") == searcher.FINISHED
    assert ends.stop_all()
    assert len(ledger.records()) == 4
    ledger.take_back()
    assert ledger.why_over() == "every setting of the space has been tried"


@pytest.mark.parametrize("sampler", ["grid", "random"])
def test_settings_that_fail_are_tried_once_more_at_the_most_in_a_space_that_has_few(tiny_sweep, tmp_path, sampler):
    sweep = with_changes(tiny_sweep, sampler=sampler, trials=30, space=FOUR, first=())
    failed = 0
    for _ in range(3):
        ledger = Ledger(sweep, tmp_path)
        while (proposal := ledger.propose()) is not None:
            if proposal.settings == {"adapter.memory": "gpm", "adapter.rank": 7}:
                failed += 1
                ledger.fail(proposal.number, "FloatingPointError: the loss is nan")
            else:
                learn_all(ledger, proposal.number, [0.9] * 5)
        assert ledger.why_over() == "every setting of the space has been tried"
    assert failed == 2
    assert len(ledger.records()) == 5


def test_no_setting_of_a_finite_space_is_left_out_by_bad_luck(tiny_sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "_SAME_SETTINGS_TRIES", 1)
    few = {"adapter.rank": Integer(low=1, high=12, log=True)}
    ledger = Ledger(with_changes(tiny_sweep, sampler="random", trials=99, space=few, first=()), tmp_path)
    ranks = []
    while (proposal := ledger.propose()) is not None:
        ranks.append(proposal.settings["adapter.rank"])
        learn_all(ledger, proposal.number, [0.9] * 5)
    assert sorted(ranks) == list(range(1, 13))


def test_different_settings_are_all_of_a_finite_space_and_as_many_as_are_asked_for_of_another():
    assert len(list(domains.different(FOUR, 99))) == 4
    rows = [repr(row) for row in domains.different(ADAPTERS, 50)]
    assert len(set(rows)) == len(rows) >= 50


def test_a_grid_has_its_ends_on_the_scale_of_the_domain():
    assert Integer(low=1, high=100, log=True).points(3) == [1, 10, 100]
    assert Real(low=0.0, high=1.0).points(3) == [0.0, 0.5, 1.0]
    assert NearOne(low=0.9, high=0.999).points(3) == [0.9, 0.99, 0.999]
    assert Integer(low=1, high=2).points(5) == [1, 2]


def test_a_setting_exists_only_beside_the_choice_that_needs_it():
    rows = domains.grid(ADAPTERS, 2)
    by_adapter = {name: {frozenset(row) for row in rows if row["adapter.name"] == name} for name in ("inflora", "none")}
    assert by_adapter["none"] == {frozenset({"adapter.name", "optim.lr"})}
    assert {len(keys) for keys in by_adapter["inflora"]} == {4, 5}, "energy exists beside dualgpm only"


def test_what_is_checked_before_a_sweep_reaches_every_conditional_setting(tiny_sweep):
    corners = with_changes(tiny_sweep, space=ADAPTERS, first=()).extreme_configs()
    adapters = [config.adapter for config in corners]
    assert {adapter.name for adapter in adapters} == {"inflora", "lora", "none"}
    assert {a.energy for a in adapters if a.name == "inflora"} >= {0.8, 0.99}
    broken = ADAPTERS | {"adapter.energy": Real(low=0.5, high=1.5, when={"adapter.memory": ("gpm",)})}
    with pytest.raises(ConfigError, match=r"adapter.energy.*1\.5"):
        with_changes(tiny_sweep, space=broken, first=()).extreme_configs()


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"space": dict(reversed(ADAPTERS.items())), "first": ()}, "when must name choices before it"),
        (
            {"space": {**ADAPTERS, "optim.head_lr": Real(low=1, high=2, when={"adapter.name": ("inflra",)})}},
            "is one of",
        ),
        ({"space": ADAPTERS, "first": ({"adapter.name": "none", "adapter.rank": 2, "optim.lr": 1e-3},)}, "exactly"),
        ({"sampler": "bayes"}, "sampler"),
        ({"early_stopping": "ashaa"}, "early_stopping"),
        ({"sampler": "cmaes", "tradeoffs": ("forgetting",)}, "cmaes has one objective"),
        ({"tradeoffs": ("acc/final",)}, "objective and tradeoffs must differ"),
        ({"tradeoffs": ("cost/gpu_hours",)}, "gpus_per_worker is 0"),
        ({"constraints": ({"metric": "forgetting"},)}, "at_most or at_least"),
        ({"budget": {"hours": 0}}, "budget.hours"),
    ],
)
def test_a_search_that_cannot_be_done_is_refused_when_it_is_written(tiny_sweep, change, rule):
    with pytest.raises(ValidationError, match=rule):
        with_changes(tiny_sweep, **change)


def test_tradeoffs_give_a_front_of_trials_that_nothing_beats(tiny_sweep, tmp_path):
    sweep = with_changes(tiny_sweep, tradeoffs=("forgetting", "params/trainable"), early_stopping="none")
    ledger = Ledger(sweep, tmp_path)
    for accuracy, forgetting, params in [(0.9, 0.2, 100), (0.8, 0.1, 100), (0.7, 0.2, 200), (0.6, 0.3, 10)]:
        number = ledger.propose().number
        own = {"forgetting": forgetting, "params/trainable": params}
        for told in (report(done, accuracy) for done in range(1, 6)):
            ledger.report(number, told.model_copy(update={"metrics": told.metrics | own}))
        ledger.close(number)
    assert pareto_front(load_study(sweep, tmp_path)) == {0, 1, 3}
    assert best_record(ledger.records()).number == 0, "the best is still the one with the best objective"
    assert ledger.records()[2].values == (0.7, 0.2, 200)


def test_trials_with_tradeoffs_are_stopped_early_like_others(tiny_sweep, tmp_path):
    ledger = Ledger(with_changes(tiny_sweep, tradeoffs=("forgetting",)), tmp_path)
    ahead, behind = ledger.propose().number, ledger.propose().number
    for done in (1, 2):
        ledger.report(ahead, report(done, 0.9))
    assert not ledger.report(behind, report(1, 0.1))
    assert ledger.report(behind, report(2, 0.1))
    assert ledger.record_of(behind).outcome is Outcome.PRUNED


def test_a_trial_that_breaks_a_constraint_finishes_but_is_never_the_best(tiny_sweep, tmp_path):
    bound = {"metric": "forgetting", "at_most": 0.1}
    sweep = with_changes(tiny_sweep, constraints=(bound,), early_stopping="none")
    ledger = Ledger(sweep, tmp_path)
    for accuracy, forgetting in [(0.9, 0.3), (0.8, 0.05)]:
        number = ledger.propose().number
        last = report(5, accuracy)
        ledger.report(number, last.model_copy(update={"metrics": last.metrics | {"forgetting": forgetting}}))
        ledger.close(number)
    broken, kept = ledger.records()
    assert (broken.outcome, broken.broken) == (Outcome.FINISHED, {"forgetting <= 0.1": pytest.approx(0.2)})
    assert kept.broken == {}
    assert best_record(ledger.records()).number == kept.number
    assert pareto_front(ledger.study) == {kept.number}


def behind_after_grace(ledger, finished):
    """Whether a trial far behind ``finished`` good ones is stopped after its second task, or goes on to the end.

    Its first task is as good as theirs, as first tasks are.
    """
    for _ in range(finished):
        learn_all(ledger, ledger.propose().number, [1.0, 0.95, 0.9, 0.85, 0.8])
    number = ledger.propose().number
    assert not ledger.report(number, report(1, 1.0)), "no trial is stopped within its grace"
    return ledger.report(number, report(2, 0.6))


@pytest.mark.parametrize(("rule", "finished", "stopped"), [("asha", 1, True), ("median", 3, True), ("none", 3, False)])
def test_early_stopping_by_name(tiny_sweep, tmp_path, rule, finished, stopped):
    ledger = Ledger(with_changes(tiny_sweep, early_stopping=rule, trials=9), tmp_path)
    assert behind_after_grace(ledger, finished) is stopped


def test_hyperband_gives_some_trials_a_longer_grace(tiny_sweep, tmp_path):
    ledger = Ledger(with_changes(tiny_sweep, early_stopping="hyperband", trials=40), tmp_path)
    for _ in range(8):
        learn_all(ledger, ledger.propose().number, [0.9] * 5)
    stopped_after = set()
    for _ in range(12):
        number = ledger.propose().number
        stopped_after.add(next((d for d in range(1, 6) if ledger.report(number, report(d, 0.1))), None))
        ledger.close(number)
    assert {2, 4} <= stopped_after
    assert 1 not in stopped_after


def test_a_warm_start_tries_the_others_best_first_and_only_once(tiny_sweep, tmp_path):
    theirs = [PAPER | {"adapter.rank": rank} for rank in (3, 5)]
    outside = PAPER | {"adapter.rank": 999}
    sweep = with_changes(tiny_sweep, first=())
    ledger = Ledger(sweep, tmp_path)
    assert ledger.warm_start([*theirs, outside], "other-1234") == 2
    assert [ledger.propose().settings for _ in range(2)] == theirs
    again = Ledger(sweep, tmp_path)
    again.warm_start([*theirs, outside], "other-1234")
    for _ in range(2):
        learn_all(again, again.propose().number, [0.9] * 5)
    assert again.propose().settings not in theirs
