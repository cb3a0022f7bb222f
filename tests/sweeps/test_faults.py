"""Machines that are not as they should be, and trials that are lost or silent: each costs time, none the sweep."""

import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
from ray import tune
from ray._private.state import actors as actor_table

from inflora.data import DATASETS, prepare_store
from inflora.data.source import Arrays, Dataset, Options
from sweeps.engine.ledger.failures import Failure, kind_of
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.records import Outcome
from sweeps.engine.run import watch
from sweeps.engine.run.actors import is_made_by_trial, waiting_for_room, waiting_groups
from sweeps.engine.run.runner import run_sweep
from sweeps.engine.run.tune import run_trials
from sweeps.engine.space.spec import Resources

from .conftest import any_node, report, sqlite

pytestmark = pytest.mark.cluster


def without_the_last_image(source, options, scratch):
    """The digits as another version may have cut them."""
    whole = DATASETS["digits"].read(source, options, scratch)
    pixels, labels = whole.splits["train"]
    return whole._replace(splits=whole.splits | {"train": Arrays(pixels[:-1], labels[:-1])})


def outcomes(records):
    return [record.outcome for record in records]


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["inline", "train"])
def test_a_machine_without_memory_costs_a_try_and_not_the_sweep(nodes, tiny_sweep, tmp_path, executor, monkeypatch):
    """Ray kills whatever starts on a machine that is fuller than it may be; this one fills up after it was asked."""
    monkeypatch.setattr("sweeps.engine.run.runner.check_nodes", lambda place: None)
    monkeypatch.setattr(watch.NodeWatch, "look", lambda self, trials: None)
    nodes(None, {"num_cpus": 1}, {"num_cpus": 1, "env_vars": {"RAY_memory_usage_threshold": "0.0001"}})
    sweep = tiny_sweep.model_copy(update={"trials": 3, "executor": executor, "early_stopping": "none"})
    records = run_sweep(sweep, tmp_path, sqlite(tmp_path), say=print).records
    assert outcomes(records) == [Outcome.FINISHED] * 3
    failed = [each.reason for record in records for each in record.tries]
    assert failed, "one trial has been there"
    assert {kind_of(reason) for reason in failed} == {Failure.HOST_MEMORY}, failed


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["inline", "train"])
@pytest.mark.parametrize("damage", ["incomplete", "other data"])
def test_a_machine_with_bad_data_is_left_out_and_its_trials_run_elsewhere(
    nodes, tiny_sweep, digits, tmp_path, executor, damage
):
    theirs = tmp_path / "data"
    if damage == "incomplete":
        shutil.copytree(digits, theirs / "digits")
        next((theirs / "digits").glob("train-*.arrow")).unlink()
    else:
        prepare_store("digits", Dataset(without_the_last_image, needs=None), Path(), Options(), str(theirs))
    nodes(2, {"num_cpus": 1, "resources": {"trial_driver": 1}, "env_vars": {"INFLORA_DATA": str(theirs)}})
    said = []

    def bring_another(line):
        said.append(line)
        if "is left out: " in line:
            nodes.cluster.add_node(num_cpus=1, resources={"trial_driver": 1})

    sweep = tiny_sweep.model_copy(update={"trials": 3, "executor": executor, "early_stopping": "none"})
    records = run_sweep(sweep, tmp_path / "sweep", sqlite(tmp_path), say=bring_another).records
    assert outcomes(records) == [Outcome.FINISHED] * 3
    (left_out,) = [line for line in said if "is left out: " in line]
    assert ("digits is of other content" if damage == "other data" else str(theirs)) in left_out
    assert sum(len(record.tries) for record in records) <= 2, "none goes there once it is known"


def test_no_cuda_where_gpus_are_asked_for_is_the_machines_fault_and_says_which_versions_there_are(
    nodes, tiny_sweep, tmp_path
):
    nodes(None, {"num_cpus": 1, "num_gpus": 1})  # in name only
    asks = {"device": "auto"}
    sweep = tiny_sweep.model_copy(
        update={
            "trials": 1,
            "executor": "inline",
            "base": tiny_sweep.config(asks),
            "resources": Resources(gpus_per_worker=1),
        }
    )
    (record,) = run_sweep(sweep, tmp_path, sqlite(tmp_path), say=print).records
    assert record.outcome is Outcome.FAILED
    assert "PyTorch finds no CUDA device here" in record.reason
    assert "no NVIDIA driver, CUDA" in record.reason and "PyTorch 2" in record.reason
    assert record.reports == []


@pytest.mark.slow
def test_what_a_dead_trial_has_asked_for_does_not_take_the_room_of_the_next(nodes, tiny_sweep, tmp_path):
    address = nodes(1, head_drives=1)
    sweep = tiny_sweep.model_copy(update={"trials": 1})
    result = []
    sweeping = threading.Thread(
        target=lambda: result.append(run_sweep(sweep, tmp_path, sqlite(tmp_path), say=print)), daemon=True
    )
    sweeping.start()
    wait_until(lambda: any(map(is_made_by_trial, waiting_groups())), 90)
    (actor_id,) = [key for key, told in actor_table().items() if told["ActorClassName"].startswith("ImplicitFunc")]
    trial = SimpleNamespace(_actor_id=ray.ActorID(bytes.fromhex(actor_id)))
    assert waiting_for_room([trial]) == [trial]
    kill_all("ImplicitFunc")
    wait_until(lambda: Ledger(sweep, tmp_path).record_of(0).tries, 60)
    late = subprocess.Popen(
        [Path(sys.executable).with_name("ray"), "start", f"--address={address}", "--num-cpus=1", "--block"],
        stdout=subprocess.DEVNULL,
    )
    try:
        sweeping.join(150)
    finally:
        late.send_signal(signal.SIGTERM)
        late.wait()
    assert result and outcomes(result[0].records) == [Outcome.FINISHED]


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.3)


def kill_all(name):
    for process in psutil.Process().children(recursive=True):
        if name in " ".join(process.cmdline()):
            process.kill()


@pytest.fixture
def ledger(tiny_sweep, tmp_path):
    ray.init(address="local", num_cpus=1, log_to_driver=False, logging_level="ERROR")
    yield Ledger(tiny_sweep.model_copy(update={"trials": 1, "executor": "inline"}), tmp_path)
    ray.shutdown()


def tells(settings, tasks=5):
    """A trial that only reports, from where it is told to go on."""
    for done in range(settings["tasks_done"] + 1, tasks + 1):
        told = report(done, 0.9)
        tune.report({**told.metrics, "report": told.model_dump_json()})


def test_a_trial_that_falls_silent_is_started_again(ledger, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "SILENT_S", 5.0)
    monkeypatch.setattr(watch, "SILENT_TASKS", 0)
    asleep = tmp_path / "asleep"

    def falls_silent(settings):
        if not asleep.exists():
            tells(settings, tasks=2)
            asleep.touch()
            time.sleep(3600)
        tells(settings)

    said = []
    run_trials(ledger, tmp_path, falls_silent, 1, said.append, any_node(ledger, tmp_path))
    (record,) = ledger.records()
    assert record.outcome is Outcome.FINISHED
    assert [(kind_of(each.reason), each.tasks_done) for each in record.tries] == [(Failure.LOST, 2)]
    assert any("trial   0 has said nothing for" in line for line in said)


def test_trials_go_on_when_tune_itself_has_stopped(ledger, tmp_path):
    class Breaks(tune.Callback):
        times = 0

        def on_trial_result(self, iteration, trials, trial, result, **info):
            if self.times < 2 and "report" in result:
                Breaks.times += 1
                raise OSError("the bucket is away")

    said = []
    run_trials(ledger, tmp_path, tells, 1, said.append, any_node(ledger, tmp_path), [Breaks()])
    (record,) = ledger.records()
    assert (record.outcome, record.tries) == (Outcome.FINISHED, ())
    assert sum("the bucket is away" in line for line in said) == 2


@pytest.mark.slow
def test_it_does_not_go_on_for_ever_when_tune_stops_in_vain(ledger, tmp_path, monkeypatch):
    monkeypatch.setattr("sweeps.engine.run.tune.STOPS_IN_VAIN", 1)

    class Breaks(tune.Callback):
        def on_trial_start(self, iteration, trials, trial, **info):
            raise OSError("no such thing")

    with pytest.raises(OSError, match="no such thing"):
        run_trials(ledger, tmp_path, tells, 1, print, any_node(ledger, tmp_path), [Breaks()])
