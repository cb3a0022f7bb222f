"""A dry run finds what does not work before anything is spent, and says what to expect."""

import time
from types import SimpleNamespace

import pytest
import ray
import torch

from inflora.config import ConfigError
from inflora.gpu_check import BEYOND_A_TRIAL
from sweeps.engine.run.cluster import THIS_MACHINE, Cluster, trials_at_a_time
from sweeps.engine.run.dry_run import (
    Timing,
    check_gpu_node,
    dry_run,
    forecast,
    time_one_task,
)
from sweeps.engine.run.preflight import check_folder
from sweeps.engine.run.runner import run_sweep
from sweeps.engine.space.spec import Resources, Sweep


def with_changes(sweep, **changes) -> Sweep:
    return Sweep.model_validate({**sweep.model_dump(), **changes})


def test_the_estimate_counts_epochs_tasks_rounds_and_gpus(tiny_sweep):
    sweep = with_changes(tiny_sweep, trials=5, resources=Resources(gpus_per_worker=0.5))
    config = sweep.config({"optim.epochs": 3, "optim.first_task": {"epochs": 7}})
    expected = forecast(sweep, config, Timing(epoch_s=10.0, rest_s=2.0), at_a_time=2)
    assert expected.trial_s == (7 + 4 * 3) * 10 + 5 * 2
    assert expected.hours == pytest.approx(3 * 200 / 3600)
    assert expected.gpu_hours == pytest.approx(5 * 200 * 0.5 / 3600)


def test_choosing_by_the_first_task_costs_one(tiny_sweep):
    space = {"optim.lr": {"kind": "real", "low": 1e-4, "high": 1e-2}}
    sweep = with_changes(tiny_sweep, protocol="first-task", space=space, first=())
    assert forecast(sweep, sweep.base, Timing(epoch_s=10.0, rest_s=2.0), at_a_time=1).trial_s == 12


def test_a_task_is_timed_in_epochs_and_the_rest(tiny_sweep):
    start = time.perf_counter()
    timing = time_one_task(tiny_sweep.base, threads=1)
    assert timing.epoch_s > 0
    assert timing.rest_s >= 0
    assert timing.epoch_s + timing.rest_s < time.perf_counter() - start


def test_a_storage_that_cannot_be_written_is_found_out(tiny_sweep, tmp_path):
    check_folder(tiny_sweep, tmp_path / "not" / "yet", THIS_MACHINE)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not a folder that may be written to"):
        check_folder(tiny_sweep, tmp_path / "file" / "below", THIS_MACHINE)


@pytest.mark.cluster
def test_a_dry_run_checks_all_and_leaves_nothing(tiny_sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    lines: list[str] = []
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    expected = dry_run(tiny_sweep, tmp_path / "sweep", uri, cluster=Cluster("local"), say=lines.append)
    assert list(dict.fromkeys(line.split(":")[0] for line in lines)) == [
        "settings",
        "storage",
        "tracking",
        "Ray",
        "cluster",
        "a tiny trial",
        "estimate",
    ]
    assert expected.trial_s > 0
    assert expected.hours > 0
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def gpu_in_name_only():
    """A Ray cluster on this machine that claims a GPU."""
    ray.init(address="local", num_cpus=2, num_gpus=1, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.cluster
def test_a_node_with_room_for_a_trial_is_checked_beyond_what_the_trial_shows(gpu_in_name_only):
    lines: list[str] = []
    check_gpu_node({"num_cpus": 1, "num_gpus": 0.5}, "cpu", lines.append)
    node = ray.util.get_node_ip_address()
    assert [line.split(": ")[:2] for line in lines] == [
        [f"GPU of node {node}", f"{name} passed"] for name in BEYOND_A_TRIAL
    ]


@pytest.mark.cluster
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_node_whose_gpu_does_not_work_is_named_before_a_trial_runs(tiny_sweep, gpu_in_name_only, tmp_path):
    base = tiny_sweep.base.model_copy(update={"device": "auto"})
    sweep = with_changes(tiny_sweep, base=base, resources=Resources(gpus_per_worker=1))
    lines: list[str] = []
    with pytest.raises(ConfigError) as refused:
        dry_run(sweep, tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}", cluster=Cluster(), say=lines.append)
    (line,) = str(refused.value).splitlines()
    assert line.startswith("GPU check 'device' failed on node ") and "PyTorch finds no CUDA device here" in line
    assert not any(line.startswith("a tiny trial") for line in lines)


@pytest.fixture
def small_cluster(monkeypatch):
    """A cluster of one machine with 4 CPUs and a GPU, as Ray tells of it; nothing runs there."""
    room = {"CPU": 4.0, "GPU": 1.0}
    monkeypatch.setattr("ray.cluster_resources", lambda: room)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": room}])
    monkeypatch.setattr("sweeps.engine.run.dry_run.check_nodes", lambda place: None)
    for asked in ("reachable_ray", "connect"):
        monkeypatch.setattr(f"sweeps.engine.run.preflight.{asked}", lambda *_: None)


def test_a_dry_run_refuses_trials_that_fit_nowhere_however_many_are_wanted(tiny_sweep, tmp_path, small_cluster):
    sweep = with_changes(tiny_sweep, resources=Resources(gpus_per_worker=8))
    uri, cluster = f"sqlite:///{tmp_path}/mlflow.db", Cluster("127.0.0.1:1", at_a_time=2)
    with pytest.raises(ConfigError, match="a trial needs 1 workers of 1 CPUs and 8 GPUs, the cluster has room for 0"):
        dry_run(sweep, tmp_path, uri, cluster=cluster, say=print)


@pytest.mark.parametrize(
    "error", [ray.exceptions.OutOfMemoryError("low on memory"), ray.exceptions.WorkerCrashedError()]
)
def test_a_dry_run_whose_worker_is_lost_is_told_in_a_line(tiny_sweep, tmp_path, monkeypatch, small_cluster, error):
    def lose(task):
        raise error

    task = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: None))
    monkeypatch.setattr("ray.remote", lambda _: task)
    monkeypatch.setattr("ray.get", lose)
    with pytest.raises(ConfigError, match=r"^a tiny trial failed: ") as refused:
        dry_run(tiny_sweep, tmp_path, f"sqlite:///{tmp_path}/mlflow.db", cluster=Cluster("127.0.0.1:1"), say=print)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(("gpus", "said"), [(0, 1), (1, 0)])
def test_trials_that_leave_a_clusters_gpus_alone_are_told_of(small_cluster, gpus, said):
    lines: list[str] = []
    trials_at_a_time(Resources(gpus_per_worker=gpus), "inline", lines.append)
    assert lines == ["Ray: no GPU is asked for (--gpus), so device auto is the CPU"] * said


def test_a_sweep_without_the_gpus_it_needs_says_so_before_it_asks_for_weights_or_writes(
    tiny_sweep, tmp_path, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sweeps.engine.run.cluster.ray.is_initialized", lambda: False)
    monkeypatch.setattr("sweeps.engine.run.preflight.identity", lambda config: pytest.fail("read the weights"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    sweep = with_changes(tiny_sweep, resources=Resources(gpus_per_worker=1))
    for start in (run_sweep, dry_run):
        with pytest.raises(ConfigError, match="a trial needs 1 GPUs and this machine has none"):
            start(sweep, tmp_path / "sweep", f"sqlite:///{tmp_path}/mlflow.db", cluster=Cluster(), say=print)
    assert list(tmp_path.iterdir()) == []
