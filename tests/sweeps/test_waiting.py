"""What is said while trials wait for machines."""

import itertools
import json

import pytest
from ray.core.generated import autoscaler_pb2, gcs_pb2

from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.records import Waiting
from sweeps.engine.ledger.trials import waiting
from sweeps.engine.run import watch
from sweeps.engine.run.cluster import DRIVER
from sweeps.engine.run.runner import run_sweep
from sweeps.engine.run.waiting import needs_of, problem_told
from sweeps.engine.run.watch import WaitWatch
from sweeps.engine.show.status import status_lines

from .conftest import sqlite

_names = itertools.count()


def group(*bundles, selector=None):
    """A placement group as Ray's control store tells of it."""
    made = gcs_pb2.PlacementGroupTableData(placement_group_id=str(next(_names)).encode())
    for bundle in bundles:
        made.bundles.add(unit_resources=bundle, label_selector=selector or {})
    return made


ONE_GPU = {"CPU": 8.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ([group(ONE_GPU)], "1 GPU and 8 CPUs"),
        ([group(ONE_GPU), group(ONE_GPU)], "1 GPU and 8 CPUs each"),
        ([group({"CPU": 1.0, "GPU": 0.5})], "0.5 GPUs and 1 CPU"),
        ([group({"CPU": 1.0, "GPU": 0.0})], "1 CPU"),
        ([group(ONE_GPU, ONE_GPU)], "2 times 1 GPU and 8 CPUs"),
        ([group({"CPU": 1.0}), group(ONE_GPU)], "1 CPU or 1 GPU and 8 CPUs each"),
        ([group({DRIVER: 1.0})], "a machine with room for a trial"),
        ([group({"CPU": 1.0}, selector={"ray.io/node-id": "!in(abc)"})], "1 CPU on one of some nodes"),
    ],
)
def test_what_groups_ask_for_is_told_in_words(groups, told):
    assert needs_of(groups) == told


def second(*failed, infeasible=False):
    """The second autoscaler's state."""
    state = autoscaler_pb2.AutoscalingState()
    for when, kind, reason in failed:
        state.failed_instance_requests.add(failed_ts=when, ray_node_type_name=kind, reason=reason)
    if infeasible:
        state.infeasible_gang_resource_requests.add()
    return state


def first(**unavailable):
    """The first autoscaler's status, as it keeps it."""
    known = {
        kind: {
            "last_checked_timestamp": when,
            "unavailable_node_information": why and dict(zip(("category", "description"), why, strict=True)),
        }
        for kind, (when, why) in unavailable.items()
    }
    return json.dumps({"autoscaler_report": {"node_availability_summary": {"node_availabilities": known}}})


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ((second(), "", ""), ""),
        ((second(), "", "{}"), ""),
        (
            (second((1, "spot", "no quota"), (2, "reserve", "none left")), "", ""),
            "could not start reserve: none left",
        ),
        ((second(infeasible=True), "", ""), "may start no machine that has it"),
        ((second(), "It failed:\nTraceback\nKeyError: 'x'\n", ""), "has failed: KeyError: 'x'"),
        ((second(), "", first(spot=(1, ("Quota", "none left")))), "could not start spot: Quota, none left"),
        ((second(), "", first(spot=(1, None))), ""),
    ],
)
def test_the_last_error_of_either_autoscaler_is_one_line(told, expected):
    assert problem_told(*told) == (f"the autoscaler {expected}" if expected else "")


def test_an_autoscalers_long_words_stay_one_line():
    (line,) = problem_told(second((1, "spot", "no\ncapacity " * 200)), "", "").splitlines()
    assert len(line) < 400


class Cluster:
    """What the watch asks Ray for, by a clock of its own."""

    def __init__(self, monkeypatch):
        self.groups, self.problem, self.now_s = [], "", 1_700_000_000
        monkeypatch.setattr(watch, "waiting_groups", lambda: self.groups)
        monkeypatch.setattr(watch, "autoscaler_problem", lambda: self.problem)
        monkeypatch.setattr(watch, "now_ms", lambda: 1000 * self.now_s)


@pytest.fixture
def cluster(monkeypatch):
    return Cluster(monkeypatch)


@pytest.fixture
def ledger(tiny_sweep, tmp_path):
    return Ledger(tiny_sweep, tmp_path)


def look_after(watched, cluster, seconds):
    cluster.now_s += seconds
    watched.look([])


def test_waiting_is_said_when_it_begins_when_its_reason_changes_and_when_it_ends(cluster, ledger):
    said = []
    watched = WaitWatch(ledger, said.append)
    cluster.groups = [group(ONE_GPU), group(ONE_GPU)]
    for _ in range(10):
        look_after(watched, cluster, 5)
    assert len(said) == 1
    assert said[0].startswith("2 trials wait for 1 GPU and 8 CPUs each, since ")
    for attempt in range(3):
        cluster.problem = f"the autoscaler could not start spot: no capacity, attempt {attempt}"
        look_after(watched, cluster, 5)
    assert len(said) == 2
    assert said[1].endswith("; the autoscaler could not start spot: no capacity, attempt 0")
    cluster.groups = []
    for _ in range(3):
        look_after(watched, cluster, 5)
    assert said[2:] == ["no trial waits for room any more"]


def test_a_trial_that_another_hands_its_room_to_does_not_wait_for_machines(cluster, ledger):
    said = []
    watched = WaitWatch(ledger, said.append)
    for _ in range(20):
        cluster.groups = [group(ONE_GPU)]
        look_after(watched, cluster, 5)
    assert said == []
    assert ledger.waiting is None


def test_waiting_counts_from_its_first_moment_whoever_else_comes_to_wait(cluster, ledger):
    watched = WaitWatch(ledger, print)
    cluster.groups, began = [group(ONE_GPU)], 1000 * (cluster.now_s + 5)
    look_after(watched, cluster, 5)
    cluster.groups = [*cluster.groups, group(ONE_GPU)]
    for _ in range(3):
        look_after(watched, cluster, 10)
    assert ledger.waiting == Waiting(2, "1 GPU and 8 CPUs each", began)


def test_who_reads_the_study_learns_of_it_while_a_driver_is_there(ledger, tiny_sweep, tmp_path):
    ledger.note_waiting(Waiting(1, "1 GPU", 1_700_000_000_000, "no\x1b[2J capacity"))
    kept = waiting(ledger.study)
    assert kept == ledger.waiting
    (line,) = (each for each in status_lines(tiny_sweep, [], None, 0.0, 0, waiting=kept) if "1 trial waits" in each)
    assert line.endswith("no\\x1b[2J capacity")
    assert not any("waits" in each for each in status_lines(tiny_sweep, [], None, 0.0, 0, waiting=kept, driven=False))
    assert waiting(Ledger(tiny_sweep, tmp_path).study) is None, "another start's trials have not waited yet"


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("executor", "head_drives", "needs"),
    [
        ("inline", 0, "1 CPU"),
        pytest.param("train", 2, "1 CPU", marks=pytest.mark.slow),
        pytest.param("train", 0, "a machine with room for a trial", marks=pytest.mark.slow),
    ],
)
def test_a_trial_without_room_is_told_of_and_what_it_needs(
    nodes, tiny_sweep, tmp_path, monkeypatch, executor, head_drives, needs
):
    monkeypatch.setattr(watch.Watch, "every_s", 0.2)
    monkeypatch.setattr(watch, "WAITS_AFTER_S", 0.5)
    nodes(2, {"num_cpus": 1, "resources": {} if head_drives else {DRIVER: 1}}, head_drives=head_drives)
    sweep = tiny_sweep.model_copy(
        update={"base": tiny_sweep.config({"optim.epochs": 10}), "trials": 2, "executor": executor}
    )
    said = []
    run_sweep(sweep, tmp_path, sqlite(tmp_path), say=said.append)
    assert any(line.startswith(f"1 trial waits for {needs}, since ") for line in said), said
    assert "no trial waits for room any more" in said
