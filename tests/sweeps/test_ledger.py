"""The study is the ledger: what is proposed, reported, stopped and finished, and what a second start finds."""

import random

import optuna
import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from inflora.config import ConfigError
from sweeps.engine.ledger.database import study_url
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.records import Outcome, TaskReport, best_record
from sweeps.engine.ledger.study import load_study
from sweeps.engine.ledger.trials import read_records, seal, validation_images
from sweeps.engine.space.domains import Choice
from sweeps.engine.space.spec import Sweep

from .conftest import PAPER, learn_all, report


@pytest.fixture
def ledger(tiny_sweep, tmp_path) -> Ledger:
    return Ledger(tiny_sweep, tmp_path)


class Stopped(BaseException):
    """What ends a process, here only a call."""


@pytest.mark.parametrize("statements", range(1, 60, 6))
def test_a_study_that_was_stopped_while_it_was_made_is_made_to_its_end(tiny_sweep, tmp_path, statements):
    """A transaction that nobody ends is undone, as after a kill; 60 statements make a study with its first trial."""
    left = iter(range(statements))

    def stop(*_):
        if next(left, None) is None:
            raise Stopped

    event.listen(Engine, "before_cursor_execute", stop)
    try:
        with pytest.raises(Stopped):
            Ledger(tiny_sweep, tmp_path)
    finally:
        event.remove(Engine, "before_cursor_execute", stop)
    ledger = Ledger(tiny_sweep, tmp_path)
    learn_all(ledger, ledger.propose().number, [0.9, 0.8, 0.7, 0.6, 0.5])
    assert [record.outcome for record in ledger.records()] == [Outcome.FINISHED]
    again = Ledger(tiny_sweep, tmp_path)
    assert [record.outcome for record in again.records()] == [Outcome.FINISHED], "the same study, not one beside it"


def test_the_papers_settings_are_the_first_trial(ledger):
    assert ledger.propose().settings == PAPER


def test_a_stopped_trial_is_never_the_best_however_good_it_looked(ledger):
    finished, stopped = ledger.propose().number, ledger.propose().number
    learn_all(ledger, finished, [1.0, 0.99, 0.9, 0.8, 0.75])
    ledger.report(stopped, report(1, 0.94))
    assert ledger.report(stopped, report(2, 0.90)), "behind at two tasks: to be stopped"
    best = best_record(ledger.records())
    assert (best.number, best.value) == (finished, 0.75)
    assert ledger.study.best_trial.number == finished
    assert ledger.record_of(stopped).outcome is Outcome.PRUNED
    assert ledger.record_of(stopped).value is None


def test_trials_are_compared_at_equal_numbers_of_tasks(ledger):
    ahead = ledger.propose().number
    learn_all(ledger, ahead, [0.95, 0.7, 0.6, 0.5, 0.4])
    later = ledger.propose().number
    # Its 0.8 after two tasks is less than the other's 0.95 after one, but more than the other's 0.7 after two.
    assert not learn_all(ledger, later, [0.9, 0.8, 0.7, 0.6, 0.5])


def test_no_trial_is_stopped_before_its_grace_or_after_its_last_task(ledger):
    learn_all(ledger, ledger.propose().number, [1.0] * 5)
    number = ledger.propose().number
    assert not ledger.report(number, report(1, 0.0)), "one task is within the grace of two"
    late = ledger.propose().number
    for done, accuracy in enumerate([1.0, 1.0, 1.0, 1.0], start=1):
        assert not ledger.report(late, report(done, accuracy))
    assert not ledger.report(late, report(5, 0.0)), "the last report is the result"


@pytest.mark.parametrize(("last", "reason"), [(float("nan"), "acc/final is nan"), (None, "ended without acc/final")])
def test_a_trial_without_a_number_to_show_fails_and_leaves_no_ghost(ledger, last, reason):
    number = ledger.propose().number
    if last is not None:
        told = report(5, 0.5).model_copy(update={"metrics": {"acc/seen": 0.5, "acc/final": last}})
        ledger.report(number, TaskReport.model_validate_json(told.model_dump_json()))
    ledger.close(number)
    record = ledger.record_of(number)
    assert (record.outcome, record.reason) == (Outcome.FAILED, reason)
    assert not ledger.study.get_trials(states=[optuna.trial.TrialState.RUNNING])
    assert best_record(ledger.records()) is None


def test_the_same_report_twice_counts_once(ledger):
    number = ledger.propose().number
    ledger.report(number, report(1, 0.9))
    ledger.report(number, report(1, 0.1))
    (only,) = ledger.record_of(number).reports
    assert only.metrics["acc/seen"] == 0.9


def test_what_comes_after_the_end_changes_nothing(ledger):
    number = ledger.propose().number
    learn_all(ledger, number, [0.9] * 5)
    ledger.fail(number, "too late")
    ledger.close(number)
    assert not ledger.report(number, report(5, 0.1))
    assert ledger.record_of(number).outcome is Outcome.FINISHED


def test_a_second_start_goes_on_with_the_interrupted_and_repeats_nothing(tiny_sweep, tmp_path):
    first = Ledger(tiny_sweep, tmp_path)
    finished, interrupted = first.propose(), first.propose()
    learn_all(first, finished.number, [0.9] * 5)
    first.report(interrupted.number, report(1, 0.8))

    second = Ledger(tiny_sweep, tmp_path)
    assert second.remaining() == tiny_sweep.trials - 1
    again = second.propose()
    assert (again.number, again.settings) == (interrupted.number, interrupted.settings)
    assert again.tasks_done == 1
    new = second.propose()
    assert new.number == 2
    assert new.settings not in (finished.settings, interrupted.settings)
    assert len(second.records()) == 3


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", "random"])
def test_a_sweep_started_again_and_again_proposes_what_an_undisturbed_one_does(tiny_sweep, tmp_path, sampler):
    sweep = tiny_sweep.model_copy(update={"sampler": sampler, "early_stopping": "none", "trials": 6})

    def search(folder, trials_per_start):
        for _ in range(sweep.trials // trials_per_start):
            ledger = Ledger(sweep, folder)
            for _ in range(trials_per_start):
                proposal = ledger.propose()
                yield proposal.settings
                learn_all(ledger, proposal.number, [proposal.settings["adapter.energy"]] * 5)

    undisturbed = list(search(tmp_path / "undisturbed", sweep.trials))
    assert list(search(tmp_path / "disturbed", 1)) == undisturbed


def test_two_seeds_have_no_random_proposal_in_common(tiny_sweep, tmp_path):
    def proposed(seed):
        changes = {"sampler": "random", "sampler_seed": seed, "first": ()}
        ledger = Ledger(tiny_sweep.model_copy(update=changes), tmp_path / str(seed))
        return {repr(ledger.propose().settings) for _ in range(4)}

    assert len(proposed(0) | proposed(1)) == 8


def test_a_driver_that_died_while_proposing_leaves_a_trial_that_can_still_be_run(tiny_sweep, tmp_path):
    Ledger(tiny_sweep, tmp_path).study.ask()
    again = Ledger(tiny_sweep, tmp_path).propose()
    assert (again.number, again.settings) == (0, PAPER)


def test_a_proposal_dropped_by_a_driver_that_died_is_not_run_after_all(tiny_sweep, tmp_path):
    first = Ledger(tiny_sweep, tmp_path)
    first.study.ask().set_user_attr("same_as", 0)
    second = Ledger(tiny_sweep, tmp_path)
    assert second.propose().number == 1
    assert [record.number for record in second.records()] == [1]


def test_a_trial_that_ends_before_its_last_task_has_failed(ledger):
    number = ledger.propose().number
    ledger.report(number, report(1, 0.9))
    ledger.close(number)
    assert ledger.record_of(number).outcome is Outcome.FAILED


def test_early_stopping_remembers_the_trials_of_earlier_starts(tiny_sweep, tmp_path):
    first = Ledger(tiny_sweep, tmp_path)
    learn_all(first, first.propose().number, [0.9] * 5)
    second = Ledger(tiny_sweep, tmp_path)
    assert learn_all(second, second.propose().number, [0.5] * 5)


def test_a_small_space_is_tried_once_and_then_ends(tiny_sweep, tmp_path):
    space = {
        "adapter.memory": Choice(options=("gpm", "dualgpm")),
        "adapter.energy_of": Choice(options=("covariance", "inputs")),
    }
    ledger = Ledger(
        Sweep.model_validate(tiny_sweep.model_dump() | {"space": space, "first": (), "trials": 10}), tmp_path
    )
    proposals = []
    while (proposal := ledger.propose()) is not None:
        proposals.append(proposal)
        learn_all(ledger, proposal.number, [0.5 + 0.1 * len(proposals)] * 5)
    settings = [tuple(p.settings.values()) for p in proposals]
    assert len(settings) == len(set(settings)) == 4
    assert len(ledger.records()) == 4, "proposals that repeat a trial are not trials"


@pytest.mark.parametrize("seed", range(4))
def test_what_a_ledger_has_in_mind_is_what_its_study_holds(tiny_sweep, tmp_path, seed):
    """Reports, ends of all kinds, failures and tries again in any order, and a second start amid them."""
    sweep = tiny_sweep.model_copy(update={"trials": 10, "retries": 0, "give_up_after": 99})
    chance, ledger, running = random.Random(seed), Ledger(sweep, tmp_path), {}
    for step in range(60):
        if len(running) < 3 and (proposal := ledger.propose()) is not None:
            running[proposal.number] = proposal.tasks_done
        if running:
            number = chance.choice(sorted(running))
            if chance.random() < 0.3:
                ledger.fail(number, chance.choice(["the node died", "SIGKILL"]))
                del running[number]
            else:
                running[number] += 1
                stopped = ledger.report(number, report(running[number], chance.random()))
                if stopped or running[number] == 5:
                    ledger.close(number)
                    del running[number]
        if step == 30:
            ledger, running = Ledger(sweep, tmp_path), {}
        assert ledger.records() == read_records(load_study(sweep, tmp_path))
    assert len({record.outcome for record in ledger.records()}) > 1


def test_the_study_can_be_read_without_the_ledger(ledger, tmp_path):
    learn_all(ledger, ledger.propose().number, [0.9] * 5)
    study = optuna.load_study(study_name=ledger.sweep.study_name, storage=study_url(tmp_path))
    assert read_records(study) == ledger.records()


@pytest.mark.parametrize("images", [True, 0, "many", 1.5])
def test_a_number_of_images_that_is_none_is_refused_in_a_line(ledger, tmp_path, images):
    assert validation_images(load_study(ledger.sweep, tmp_path)) is None, "as in studies from before it was noted"
    ledger.note_images(350)
    assert validation_images(load_study(ledger.sweep, tmp_path)) == Ledger(ledger.sweep, tmp_path).images == 350
    ledger.study.set_user_attr("images", seal(images))
    with pytest.raises(ConfigError, match=r"cannot read the study .*: its trials were judged on .* images"):
        load_study(ledger.sweep, tmp_path)


def test_a_folder_whose_study_is_another_sweeps_is_refused_and_left_as_it_is(tiny_sweep, tmp_path):
    """Also what the same recipe began under a version whose settings had other names or defaults."""
    Ledger(tiny_sweep, tmp_path).propose()
    other = tiny_sweep.model_copy(update={"base": tiny_sweep.config({"optim.epochs": 7})})
    with pytest.raises(ConfigError, match=f"holds {tiny_sweep.study_name}, not {other.study_name}"):
        Ledger(other, tmp_path)
    with pytest.raises(ConfigError, match="begun by a version with other settings"):
        load_study(other, tmp_path)
    assert len(Ledger(tiny_sweep, tmp_path).records()) == 1
