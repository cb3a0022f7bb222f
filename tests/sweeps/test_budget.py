"""When a sweep ends: by its trials, its time, its GPU-hours, its target or its patience, and it says by which."""

import inspect

import pytest
from pydantic import ValidationError

from inflora.config import ConfigError, parse_duration_s
from sweeps.engine.ledger import ledger as ledger_module
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.records import Outcome
from sweeps.engine.show.status import status_lines
from sweeps.engine.space import estimate as estimate_module
from sweeps.engine.space.estimate import estimate
from sweeps.engine.space.spec import Budget, Constraint, Sweep
from sweeps.recipe import with_budget_options

from .conftest import learn_all, report


def make_ledger(sweep, folder, resources=None, **budget) -> Ledger:
    changes = {"budget": budget, "trials": 9} | ({"resources": resources} if resources else {})
    return Ledger(Sweep.model_validate(sweep.model_dump() | changes), folder)


def finish_one(ledger, accuracy):
    learn_all(ledger, ledger.propose().number, [accuracy] * 5)


def test_a_target_that_is_reached_ends_the_sweep(tiny_sweep, tmp_path):
    ledger = make_ledger(tiny_sweep, tmp_path, target=0.8)
    finish_one(ledger, 0.79)
    assert ledger.why_over() == ""
    finish_one(ledger, 0.81)
    assert ledger.why_over() == "target reached: acc/final 0.8100 in trial 1, asked for 0.8"
    assert ledger.propose() is None


def test_patience_counts_the_trials_since_the_best_however_they_ended(tiny_sweep, tmp_path):
    ledger = make_ledger(tiny_sweep, tmp_path, patience=2)
    finish_one(ledger, 0.7)
    finish_one(ledger, 0.8)
    finish_one(ledger, 0.75)
    assert ledger.why_over() == ""
    ledger.fail(ledger.propose().number, "FloatingPointError")
    assert ledger.why_over() == "patience over: 2 trials ended since trial 1 scored highest"


def test_gpu_hours_count_what_every_trial_has_trained_also_stopped_ones(tiny_sweep, tmp_path):
    ledger = make_ledger(tiny_sweep, tmp_path, {"gpus_per_worker": 2}, gpu_hours=1.0)
    number = ledger.propose().number
    for done, hours in enumerate((0.2, 0.2), start=1):
        ledger.report(number, report(done, 0.9).model_copy(update={"seconds": hours * 3600}))
    ledger.fail(number, "FloatingPointError")
    assert ledger.why_over() == ""
    number = ledger.propose().number
    ledger.report(number, report(1, 0.9).model_copy(update={"seconds": 0.2 * 3600}))
    ledger.fail(number, "FloatingPointError")
    assert ledger.why_over() == "GPU budget spent: 1.20 of 1 GPU-hours"


def test_gpu_hours_of_a_running_trial_count_at_every_report(tiny_sweep, tmp_path):
    ledger = make_ledger(tiny_sweep, tmp_path, {"gpus_per_worker": 2}, gpu_hours=1.0)
    number = ledger.propose().number
    ledger.report(number, report(1, 0.9).model_copy(update={"seconds": 0.3 * 3600}))
    assert ledger.why_over() == ""
    ledger.report(number, report(2, 0.9).model_copy(update={"seconds": 0.3 * 3600}))
    assert ledger.why_over() == "GPU budget spent: 1.20 of 1 GPU-hours"
    ledger.close(number)
    assert ledger.record_of(number).outcome is Outcome.RUNNING, "interrupted, not failed"


def test_time_counts_over_all_starts_and_interrupts_what_runs(tiny_sweep, tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(ledger_module.time, "monotonic", lambda: now)
    ledger = make_ledger(tiny_sweep, tmp_path, hours=1.0)
    running = ledger.propose().number
    ledger.report(running, report(1, 0.9))
    now = 2400.0
    finish_one(ledger, 0.7)
    second = make_ledger(tiny_sweep, tmp_path, hours=1.0)
    assert second.propose().number == running
    now += 600
    assert second.why_over() == ""
    now += 700
    assert second.why_over().startswith("time budget spent")
    second.close(running)
    assert second.record_of(running).outcome is Outcome.RUNNING, "interrupted, not failed"
    assert second.propose() is None

    third = make_ledger(tiny_sweep, tmp_path, hours=2.0)
    again = third.propose()
    assert (again.number, again.tasks_done) == (running, 1), "more time goes on with what was interrupted"


def test_a_sweep_ends_when_more_trials_promise_less_than_asked_for(tiny_sweep, tmp_path, monkeypatch):
    asked = []
    gain = estimate_module.imagined_gain
    monkeypatch.setattr(estimate_module, "imagined_gain", lambda *question: asked.append(1) or gain(*question))
    changes = {"early_stopping": "none", "sampler": "random", "trials": 12}
    ledger = make_ledger(tiny_sweep.model_copy(update=changes), tmp_path, until_gain=100.0)
    for _ in range(7):
        finish_one(ledger, 0.7)
    assert (ledger.why_over(), asked) == ("", []), "seven trials tell too little to end a sweep"
    number = ledger.propose().number
    for done in range(1, 5):
        ledger.report(number, report(done, 0.7))
    assert asked == [], "a report is no end of a trial"
    learn_all(ledger, number, [0.7] * 5, after=4)
    points = 100 * estimate(ledger.sweep, ledger.records()).expected_gain()
    reason = f"little left to gain: 8 more trials are expected to add {points:.2f} points, asked for 100"
    assert ledger.why_over() == reason
    assert ledger.propose() is None
    status_lines(ledger.sweep, ledger.records(), estimate(ledger.sweep, ledger.records(), 350), 0.5, 0)
    assert len(asked) == 1, "worked out once, however often it is asked for"
    assert make_ledger(tiny_sweep, tmp_path, until_gain=100.0).why_over() == reason
    assert make_ledger(tiny_sweep, tmp_path, until_gain=1e-6).propose() is not None, "asked for less, it goes on"


def test_a_front_has_no_gain_to_wait_for(tiny_sweep, tmp_path):
    with pytest.raises(ValidationError, match="until_gain asks for one objective"):
        make_ledger(tiny_sweep.model_copy(update={"tradeoffs": ("forgetting",)}), tmp_path, until_gain=0.2)


def test_a_gain_that_knows_no_constraints_ends_no_sweep_that_has_some(tiny_sweep, tmp_path):
    bound = Constraint(metric="forgetting", at_most=0.1)
    with pytest.raises(ValidationError, match="until_gain knows no constraints"):
        make_ledger(tiny_sweep.model_copy(update={"constraints": (bound,)}), tmp_path, until_gain=0.2)


def test_more_trials_add_to_a_finished_sweep(tiny_sweep, tmp_path):
    two = tiny_sweep.model_copy(update={"trials": 2})
    first = Ledger(two, tmp_path)
    finish_one(first, 0.5)
    finish_one(first, 0.6)
    assert Ledger(two, tmp_path).propose() is None
    more = Ledger(tiny_sweep.model_copy(update={"trials": 3}), tmp_path)
    assert (more.remaining(), more.propose().number) == (1, 2)


def test_progress_tells_trials_time_budget_and_best(tiny_sweep, tmp_path):
    limits = {"hours": 2.0, "gpu_hours": 8, "storage_gb": 1, "target": 0.9, "patience": 5}
    ledger = make_ledger(tiny_sweep, tmp_path, {"gpus_per_worker": 1}, **limits)
    finish_one(ledger, 0.5)
    ledger.propose()
    known = estimate(ledger.sweep, ledger.records(), images=350)
    text = "\n".join(status_lines(ledger.sweep, ledger.records(), known, hours=0.5, stored_bytes=10**8))
    assert "1 of 9 trials ended: 1 running, 1 finished" in text
    assert "about 4.00 hours to go at this pace" in text
    assert "0.50 hours so far, 1.50 left" in text
    assert "0.10 GB of checkpoints, 0.90 left" in text
    assert "GPU-hours of training, 8.00 left" in text
    assert "best so far: trial 0, acc/final estimated 0.5000 (0." in text
    assert "observed 0.5000" in text
    assert "target: acc/final 0.9" in text
    assert "patience: 0 of 5 trials" in text


def test_every_budget_is_an_option_of_a_recipe():
    def command(time_budget: str, **budget) -> None:
        pass

    options = inspect.signature(with_budget_options(command)).parameters
    assert set(options) == {*Budget.model_fields} - {"hours"} | {"time_budget"}


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200)])
def test_a_time_is_given_with_its_unit(text, seconds):
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-3", "1d", "h", "0m"])
def test_no_time_at_all_is_refused(text):
    with pytest.raises(ConfigError, match="a time is given as 90"):
        parse_duration_s(text)
