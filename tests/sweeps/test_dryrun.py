"""A dry run finds what does not work before anything is spent, and says what to expect."""

import time

import pytest

from inflora.config import ConfigError
from sweeps.engine.cluster import Cluster
from sweeps.engine.dryrun import Timing, check_storage, check_tracking, dry_run, estimate, time_one_task
from sweeps.engine.spec import Resources, Sweep

from .test_tracking import free_port


def with_changes(sweep, **changes) -> Sweep:
    return Sweep.model_validate({**sweep.model_dump(), **changes})


def test_the_estimate_counts_epochs_tasks_rounds_and_gpus(tiny_sweep):
    sweep = with_changes(tiny_sweep, trials=5, resources=Resources(gpus_per_worker=0.5))
    config = sweep.config({"optim.epochs": 3, "optim.first_task": {"epochs": 7}})
    expected = estimate(sweep, config, Timing(epoch_s=10.0, rest_s=2.0), at_a_time=2)
    assert expected.trial_s == (7 + 4 * 3) * 10 + 5 * 2
    assert expected.hours == pytest.approx(3 * 200 / 3600)
    assert expected.gpu_hours == pytest.approx(5 * 200 * 0.5 / 3600)


def test_choosing_by_the_first_task_costs_one(tiny_sweep):
    space = {"optim.lr": {"kind": "real", "low": 1e-4, "high": 1e-2}}
    sweep = with_changes(tiny_sweep, protocol="first-task", space=space, first=())
    assert estimate(sweep, sweep.base, Timing(epoch_s=10.0, rest_s=2.0), at_a_time=1).trial_s == 12


def test_a_task_is_timed_in_epochs_and_the_rest(tiny_sweep):
    start = time.perf_counter()
    timing = time_one_task(tiny_sweep.base, threads=1)
    assert timing.epoch_s > 0
    assert timing.rest_s >= 0
    assert timing.epoch_s + timing.rest_s < time.perf_counter() - start


def test_a_storage_that_cannot_be_written_is_found_out(tmp_path):
    check_storage(tmp_path / "not" / "yet")
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="does not work"):
        check_storage(tmp_path / "file" / "below")


def test_a_tracking_server_that_is_away_is_found_out(tmp_path):
    check_tracking(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert list(tmp_path.iterdir()) == [], "a store is made by the sweep, not by asking"
    with pytest.raises(ConfigError, match="does not answer"):
        check_tracking(f"http://127.0.0.1:{free_port()}")


@pytest.mark.cluster
def test_a_dry_run_checks_all_and_leaves_nothing(tiny_sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    lines: list[str] = []
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    expected = dry_run(tiny_sweep, tmp_path / "sweep", uri, cluster=Cluster("local"), say=lines.append)
    assert [line.split(":")[0] for line in lines] == [
        "settings",
        "storage",
        "tracking",
        "cluster",
        "a tiny trial",
        "estimate",
    ]
    assert expected.trial_s > 0
    assert expected.hours > 0
    assert list(tmp_path.iterdir()) == []
