"""Trials that fail: tried again where that can help, ended with their reason where not, never the sweep's end."""

import pickle

import pytest

from inflora.config import override
from inflora.storage import SharedFolder
from sweeps.engine.ledger import ledger as ledger_module
from sweeps.engine.ledger.failures import (
    Failure,
    NodeFault,
    Tried,
    alike,
    change_for,
    headline,
    kind_of,
    node_of,
    pause_before,
)
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.records import Outcome, sick_nodes
from sweeps.engine.run.placement import placed_trainable
from sweeps.engine.run.storage import Housekeeping
from sweeps.engine.run.tune import StudySearcher, gpus_for_retry
from sweeps.engine.show.mirror import Mirror
from sweeps.engine.show.report import page
from sweeps.engine.space.domains import Integer, NearOne
from sweeps.engine.space.spec import Resources, Sweep

from .conftest import Anywhere, learn_all, report, sqlite

LOST = "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task."
FULL = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
NAN = "FloatingPointError: the loss of task 0, epoch 3 is nan; try a smaller optim.lr"
GONE = "The actor is dead because its node has died. Node Id: 7ec9"
STRANGE = "KeyError: 'blocks.0'"
HERE, THERE = "a1" * 28, "b2" * 28
KILLED = (
    "ray.exceptions.OutOfMemoryError: 1 worker(s) were killed due to the node running low on memory. Memory on the "
    f"node (IP: 10.0.0.3, ID: {HERE}) was 31.41GB used / 32.00GB limit (0.98)"
)


def at_fault(node_id):
    return f"NodeFault {NodeFault('10.0.0.3', node_id, 'DataError: digits has 3 of 4 files')}"


@pytest.fixture
def ledger(tiny_sweep, tmp_path) -> Ledger:
    return Ledger(tiny_sweep, tmp_path)


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (LOST, Failure.LOST),
        (GONE, Failure.LOST),
        ("The actor 5db8 is unavailable: The actor is temporarily unavailable", Failure.LOST),
        ("Task was killed due to the node running low on memory.", Failure.HOST_MEMORY),
        (KILLED, Failure.HOST_MEMORY),
        (FULL, Failure.GPU_MEMORY),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", Failure.GPU_MEMORY),
        ("MemoryError", Failure.HOST_MEMORY),
        (at_fault(HERE), Failure.NODE),
        (NAN, Failure.HOPELESS),
        ("inflora.config.ConfigError: adapter.rank must be at most 32", Failure.HOPELESS),
        (STRANGE, Failure.UNKNOWN),
    ],
)
def test_what_kind_of_failure_a_text_tells_of(reason, kind):
    assert kind_of(reason) is kind


def test_a_machines_fault_is_told_alike_in_another_process():
    fault = NodeFault("10.0.0.3", HERE, "DataError: digits has 3 of 4 files")
    assert str(pickle.loads(pickle.dumps(fault))) == str(fault)


@pytest.mark.parametrize(
    ("failed", "gpus", "change"),
    [
        ([LOST], 1, "from its last finished task"),
        ([LOST, LOST], 1, "from its last finished task"),
        ([LOST, LOST, LOST], 1, None),
        ([STRANGE], 1, "from its last finished task"),
        ([STRANGE, STRANGE], 1, None),
        ([NAN], 1, None),
        ([FULL], 1, None),
        ([FULL], 0.5, "with a GPU of its own"),
        ([FULL, FULL], 0.5, None),
        ([FULL], 0, "when there may be more memory"),
        ([KILLED], 1, "when there may be more memory"),
        ([KILLED, KILLED, KILLED], 1, None),
        ([LOST, LOST, KILLED], 1, "when there may be more memory"),
        ([KILLED, LOST, STRANGE], 1, "from its last finished task"),
        ([KILLED, LOST, STRANGE, LOST, KILLED, STRANGE], 1, None),
        ([at_fault(HERE)], 1, "elsewhere"),
        ([at_fault(HERE), at_fault(THERE)], 1, "elsewhere"),
        ([at_fault(HERE), at_fault(HERE)], 1, None),
        ([at_fault(HERE), at_fault(THERE), at_fault("c3" * 28)], 1, None),
    ],
)
def test_a_trial_is_tried_again_only_where_that_can_help_and_not_for_ever(failed, gpus, change):
    in_vain = [Tried(reason, 1) for reason in failed]
    assert change_for(in_vain, retries=2, gpus_per_worker=gpus) == change


@pytest.mark.parametrize("reason", [LOST, KILLED, STRANGE])
def test_a_trial_that_gets_on_between_its_losses_is_tried_again_however_many_they_are(reason):
    getting_on = [Tried(reason, tasks_done) for tasks_done in range(20)]
    assert change_for(getting_on, retries=2, gpus_per_worker=1) is not None


def test_a_text_names_the_node_whose_fault_it_was():
    assert node_of(at_fault(HERE)) == HERE
    assert node_of(KILLED) == HERE
    assert node_of(GONE) is None and node_of(NAN) is None


def test_a_node_is_sick_for_what_failed_there_unless_the_trial_fails_everywhere(ledger):
    """One machine lacks its data; another trial's settings are refused wherever it runs."""
    unlucky, wrong = ledger.propose().number, ledger.propose().number
    ledger.fail(unlucky, at_fault(HERE))
    assert sick_nodes(ledger.records()) == {HERE: at_fault(HERE)}
    for node_id in (HERE, THERE, "c3" * 28):
        ledger.fail(wrong, at_fault(node_id))
        again = ledger.propose()
        while again.number != wrong and ledger.record_of(wrong).outcome is Outcome.RUNNING:
            again = ledger.propose()
    assert ledger.record_of(wrong).outcome is Outcome.FAILED
    assert sick_nodes(ledger.records()) == {HERE: at_fault(HERE)}


def test_a_trial_that_was_too_large_for_its_share_of_a_gpu_gets_all_of_one():
    assert gpus_for_retry(Resources(gpus_per_worker=0.25), [FULL]) == 1
    assert gpus_for_retry(Resources(gpus_per_worker=0.25), [LOST]) == 0.25
    assert gpus_for_retry(Resources(), [FULL]) == 0


def test_a_lost_trial_comes_back_under_its_own_number_with_what_it_has_learnt(ledger):
    first = ledger.propose()
    ledger.report(first.number, report(1, 0.9))
    ledger.fail(first.number, LOST)
    ledger.close(first.number)  # Tune tells of the end after the failure
    assert ledger.record_of(first.number).outcome is Outcome.RUNNING
    again = ledger.propose()
    assert (again.number, again.settings, again.tasks_done) == (first.number, first.settings, 1)
    assert not learn_all(ledger, again.number, [0.9] * 5)
    record = ledger.record_of(first.number)
    assert (record.outcome, record.tries) == (Outcome.FINISHED, (Tried(LOST, 1),))
    assert len(ledger.records()) == 1


def test_a_trial_that_a_full_machine_has_killed_holds_its_room_and_waits_ever_longer_until_it_gets_on(ledger, tmp_path):
    searcher = StudySearcher(ledger, Anywhere())

    def pause(reason: str) -> float:
        ledger.fail(0, reason)
        return searcher.suggest("again")["pause_s"]

    assert searcher.suggest("first")["pause_s"] == 0
    assert [pause(reason) for reason in (KILLED, LOST, KILLED)] == [15, 0, 30]
    ledger.report(0, report(1, 0.9))
    assert StudySearcher(Ledger(ledger.sweep, tmp_path), Anywhere()).suggest("driver")["pause_s"] == 0
    assert pause(KILLED) == 15
    assert pause_before([Tried(KILLED, 0)] * 9, 0) == 60


@pytest.mark.parametrize("executor", ["inline", "train"])
def test_a_pause_is_in_the_trials_own_place(tiny_sweep, monkeypatch, executor):
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr("sweeps.engine.run.placement.has_drivers", lambda: False)
    learnt = lambda *_, **__: lambda settings: slept.append(settings["number"])  # noqa: E731
    for name in ("inline_trial", "train_driver"):
        monkeypatch.setattr(f"sweeps.engine.run.placement.{name}", learnt)
    trial = placed_trainable(tiny_sweep.model_copy(update={"executor": executor}), "trials")
    trial({"pause_s": 30.0, "number": 7})
    assert slept == [30.0, 7]


def test_tries_are_counted_over_all_starts(tiny_sweep, tmp_path):
    for _ in range(3):
        ledger = Ledger(tiny_sweep, tmp_path)
        ledger.fail(ledger.propose().number, LOST)
    record = ledger.record_of(0)
    assert (record.outcome, record.reason, len(record.tries)) == (Outcome.FAILED, LOST, 3)


def test_a_hopeless_trial_ends_at_once_with_its_reason_and_the_next_one_starts(ledger):
    number = ledger.propose().number
    ledger.fail(number, NAN)
    assert (ledger.record_of(number).outcome, ledger.record_of(number).reason) == (Outcome.FAILED, NAN)
    assert ledger.propose().number == number + 1


def test_tune_waits_while_a_running_trial_may_still_come_back(tiny_sweep, tmp_path):
    ledger = Ledger(tiny_sweep.model_copy(update={"trials": 1}), tmp_path)
    searcher = StudySearcher(ledger, Anywhere())
    number = searcher.suggest("a")["number"]
    assert searcher.suggest("b") is None
    ledger.fail(number, LOST)
    assert searcher.suggest("b")["number"] == number
    learn_all(ledger, number, [0.9] * 5)
    assert searcher.suggest("c") == searcher.FINISHED


def test_a_sweep_whose_first_trials_all_fail_alike_ends_with_their_reason(ledger):
    for epoch in range(3):
        assert ledger.why_over() == ""
        ledger.fail(ledger.propose().number, NAN.replace("epoch 3", f"epoch {epoch}"))
    assert ledger.why_over().startswith("the first 3 trials all failed alike: FloatingPointError")
    assert ledger.propose() is None


def test_started_again_it_tries_again_what_may_have_been_mended(tiny_sweep, tmp_path):
    first = Ledger(tiny_sweep, tmp_path)
    for _ in range(3):
        first.fail(first.propose().number, NAN)
    assert Ledger(tiny_sweep, tmp_path).propose().number == 3


@pytest.mark.parametrize("reasons", [(NAN, NAN, "RuntimeError: other"), (NAN, None, NAN, NAN)])
def test_one_other_end_among_the_first_lets_the_sweep_go_on(ledger, reasons):
    for reason in reasons:
        number = ledger.propose().number
        if reason is None:
            learn_all(ledger, number, [0.9] * 5)
        else:
            ledger.fail(number, reason)
            if ledger.record_of(number).outcome is Outcome.RUNNING:
                ledger.fail(ledger.propose().number, reason)
    assert ledger.why_over() == ""


def test_failures_are_alike_whatever_their_numbers():
    assert alike([NAN, NAN.replace("epoch 3 is nan", "epoch 17 is nan")])
    assert alike(["took 12345678.5 s", "took 1.5 s"])
    assert not alike([NAN, STRANGE])


def test_failures_are_alike_on_whatever_machines_they_are():
    assert alike([at_fault(HERE), at_fault("0f3e" * 14).replace("10.0.0.3", "10.0.12.4")])
    assert alike([f"The actor {actor} died." for actor in ("c0ffee" * 6, "1e5a" * 8)])
    assert not alike([at_fault(HERE), at_fault(HERE).replace("DataError", "ConfigError")])


def test_the_headline_of_a_traceback_is_the_error_and_not_what_follows_it():
    text = f"Traceback:\n  File x\n{LOST}\n\tclass_name: Trial\n\tactor_id: 123\n"
    assert headline(text) == LOST
    bare = f"The actor died unexpectedly before finishing this task.\n\tclass_name: T\n{GONE}\nThe actor never ran.\n"
    assert headline(bare) == GONE
    full = f"{KILLED}\nEviction Stats:\nRefer to the documentation on how to address the out of memory issue\n"
    assert headline(full) == KILLED
    assert headline("") == "unknown error"


# Settings of which each is allowed, and not all together.

ENERGIES = {"adapter.energy": NearOne(low=0.9, high=0.999), "adapter.energy_end": NearOne(low=0.95, high=0.9999)}
KEPT, BROKEN = {"adapter.energy": 0.9, "adapter.energy_end": 0.99}, {"adapter.energy": 0.99, "adapter.energy_end": 0.96}
RULE = "ConfigError: adapter: energy_end must be at least energy (0.99), got 0.96"


def of_energies(sweep, *first) -> Sweep:
    return Sweep.model_validate(sweep.model_dump() | {"space": ENERGIES, "first": first, "trials": 9})


def test_settings_that_a_rule_between_them_refuses_fail_without_a_run_and_the_next_are_proposed(tiny_sweep, tmp_path):
    sweep = of_energies(tiny_sweep, BROKEN, KEPT)
    sweep.model_copy(update={"first": ()}).extreme_configs()  # each alone is accepted
    ledger = Ledger(sweep, tmp_path)
    suggested = StudySearcher(ledger, Anywhere()).suggest("a")
    assert suggested["number"] == 1
    refused = Ledger(sweep, tmp_path).record_of(0)
    assert (refused.outcome, refused.reason, refused.tries) == (Outcome.FAILED, RULE, ())
    assert sick_nodes([refused]) == {}


def test_blocks_that_a_backbone_does_not_have_are_the_settings_fault_and_no_node_s(tiny_sweep, tmp_path):
    blocks = {f"adapter.{kind}_blocks": Integer(low=1, high=2) for kind in ("general", "expert")}
    base = override(tiny_sweep.base, {"adapter": "dualprompt", "adapter.general_blocks": 0, "adapter.expert_blocks": 1})
    first = ({"adapter.general_blocks": 2, "adapter.expert_blocks": 1}, dict.fromkeys(blocks, 1))
    sweep = Sweep.model_validate(tiny_sweep.model_dump() | {"base": base, "space": blocks, "first": first})
    ledger = Ledger(sweep, tmp_path)
    assert ledger.propose().number == 1
    assert ledger.record_of(0).reason.startswith("ConfigError: adapter.general_blocks + adapter.expert_blocks")


def test_settings_that_were_refused_when_they_had_begun_no_longer_stand_in_the_way(tiny_sweep, tmp_path, monkeypatch):
    sweep = of_energies(tiny_sweep, BROKEN, KEPT)
    with monkeypatch.context() as older:
        older.setattr(ledger_module, "_why_refused", lambda *_: "")
        assert Ledger(sweep, tmp_path).propose().number == 0
    ledger = Ledger(sweep, tmp_path)
    Housekeeping(ledger, tmp_path, SharedFolder(str(tmp_path))).tidy()
    assert ledger.propose().number == 1
    assert ledger.record_of(0).reason == RULE


def test_trials_that_were_refused_are_shown_and_do_not_end_the_sweep_or_come_again(tiny_sweep, tmp_path):
    broken = [BROKEN | {"adapter.energy_end": end} for end in (0.96, 0.97, 0.98)]
    sweep = of_energies(tiny_sweep, *broken, KEPT)
    for _ in range(2):
        ledger = Ledger(sweep, tmp_path)
        assert ledger.propose().number == 3
        assert ledger.why_over() == ""
    learn_all(ledger, 3, [0.9] * 5)
    Housekeeping(ledger, tmp_path, SharedFolder(str(tmp_path))).tidy()
    assert RULE in page(sweep, ledger.study)
    mirror = Mirror(sweep, tmp_path, sqlite(tmp_path), {})
    mirror.finish(complete=False)
    assert mirror.client.get_run(mirror._children[0].info.run_id).data.tags["inflora.reason"] == RULE
