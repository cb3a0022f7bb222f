"""Final training where no folder is seen by all nodes, but a bucket is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from inflora.config import ConfigError, dump_config, override
from inflora.runs import train_into
from inflora.storage import SharedFolder
from sweeps.cli import home_of
from sweeps.engine.after.final import FinalRun, FinalTraining, _train_one, kept_as, plan, train_all, train_by_way_of
from sweeps.engine.ledger.failures import NodeFault
from sweeps.engine.run.cluster import gpus_of_a_run
from sweeps.engine.space.spec import Resources

from .conftest import Recipe


@pytest.fixture
def config(tiny_sweep):
    return tiny_sweep.config({"adapter.rank": 4})


def files_in(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def result_in(folder):
    return json.loads((folder / "result.json").read_text())


def test_a_run_that_is_interrupted_goes_on_elsewhere_from_what_the_bucket_keeps(config, bucket, tmp_path):
    run = FinalRun("inflora", 0, config, tmp_path / "nobody-sees" / "inflora-1" / "seed-0")
    place = SharedFolder(f"{bucket}/final")
    learnt = []

    def lose_the_machine_after_two(result):
        learnt.append(result.task)
        if len(learnt) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_by_way_of(place, run, lose_the_machine_after_two)
    train_by_way_of(place, run, lambda result: learnt.append(result.task))
    assert learnt == [0, 1, 2, 3, 4], "no task twice"
    train_by_way_of(place, run, lambda result: pytest.fail("it is complete"))

    assert not (tmp_path / "nobody-sees").exists()
    place.copy_to(kept_as(run), run.folder)
    alone = tmp_path / "alone"
    train_into(alone, config, "test")
    assert files_in(run.folder) == files_in(alone)
    assert result_in(run.folder) == result_in(alone)


@pytest.mark.parametrize("written", range(4))
def test_a_run_whose_machine_goes_amid_its_first_files_can_be_begun_again(
    config, bucket, tmp_path, monkeypatch, written
):
    run = FinalRun("inflora", 0, config, tmp_path / "nobody-sees" / "inflora-2" / f"seed-{written}")
    place, left, write = SharedFolder(f"{bucket}/final"), iter(range(written)), SharedFolder.write

    def stop(self, name, content):
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(self, name, content)

    with monkeypatch.context() as stopped:
        stopped.setattr(SharedFolder, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            train_by_way_of(place, run, lambda result: None)
    learnt = []
    train_by_way_of(place, run, lambda result: learnt.append(result.task))
    assert learnt[-1] == 4


def test_a_run_that_asks_for_a_gpu_does_not_train_where_pytorch_finds_none(config, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "a1" * 28))
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.3")
    run = FinalRun("inflora", 0, override(config, {"device": "auto"}), tmp_path / "inflora-3" / "seed-0")
    with pytest.raises(NodeFault, match=r"on node 10\.0\.0\.3 .*PyTorch finds no CUDA device here"):
        _train_one(run, Resources(gpus_per_worker=1), None, None)
    assert not run.folder.exists()


@pytest.mark.parametrize(
    ("asked", "cluster", "wanted", "placed", "gpus"),
    [
        (0, {"GPU": 8}, "auto", "cpu", 0),
        (1, {"GPU": 8}, "auto", "auto", 1),
        (None, {"GPU": 8}, "auto", "auto", 1),
        (None, {"GPU": 8}, "cpu", "cpu", 0),
        (None, {"CPU": 8}, "auto", "cpu", 0),
        (None, {"CPU": 0, "trials_at_a_time": 4}, "cpu", "cpu", 0),
    ],
)
def test_runs_are_on_gpus_where_there_are_some_or_as_many_as_are_asked_for_and_in_the_same_folders(
    config, tmp_path, monkeypatch, asked, cluster, wanted, placed, gpus
):
    for name in ("reachable_ray", "connect", "trials_at_a_time", "check_nodes"):
        monkeypatch.setattr(f"sweeps.engine.after.final.{name}", lambda *_: None)
    monkeypatch.setattr("ray.cluster_resources", lambda: cluster)
    asked_of_ray: list[float] = []
    monkeypatch.setattr(
        "sweeps.engine.after.final.train_all", lambda _, resources, *__: asked_of_ray.append(resources.gpus)
    )
    configs = {"inflora": override(config, {"device": wanted})}
    training = FinalTraining([0, 1], None, Resources(gpus_per_worker=asked or 0), "head:1", finds_gpus=asked is None)
    runs = training.train(configs, tmp_path, "test", print)
    assert {run.config.device for run in runs} == {placed}
    assert asked_of_ray == [gpus]
    assert [run.folder for run in runs] == [run.folder for run in plan(configs, [0, 1], tmp_path)]


@pytest.mark.parametrize("can_use_it", [True, False])
def test_a_card_of_this_machine_that_pytorch_cannot_use_is_not_asked_for(monkeypatch, can_use_it):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 1})
    monkeypatch.setattr("torch.cuda.is_available", lambda: can_use_it)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert gpus_of_a_run(None) == can_use_it
    assert gpus_of_a_run("head:6379") == 1, "whose machines are others"


def test_a_cluster_that_may_get_gpus_and_has_none_is_to_be_told_whether_runs_want_one(monkeypatch):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"trials_at_a_time": 4})
    with pytest.raises(ConfigError, match="say --gpus 1, or --gpus 0"):
        gpus_of_a_run("head:6379")


class OneMachine:
    """Ray as final training asks it: every task has ended at once, with an accuracy or an error."""

    def __init__(self, ends, told):
        self.ends, self.told = ends, told
        self.remote = lambda task: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda run, *_: run.seed))
        self.get_runtime_context = lambda: SimpleNamespace(get_node_id=lambda: "a1" * 28)
        self.exceptions = ray.exceptions

    def wait(self, waiting, **_):
        return waiting[:1], waiting[1:]

    def get(self, seed):
        end = self.ends[seed]
        if isinstance(end, Exception):
            raise end
        return end

    def queue(self, actor_options):
        self.told.append(actor_options)
        return SimpleNamespace(qsize=lambda: 0, get_nowait_batch=lambda _: [], shutdown=lambda: None)


def failed_by(error):
    return ray.exceptions.RayTaskError("_train_one", "Traceback ...", error).as_instanceof_cause()


def test_a_run_that_fails_ends_no_other_and_all_that_have_failed_are_named_in_a_line(config, tmp_path, monkeypatch):
    lost = ray.exceptions.WorkerCrashedError()
    killed, full = ray.exceptions.OutOfMemoryError("low on memory"), failed_by(RuntimeError("CUDA out of memory"))
    ends = [0.5, lost, killed, failed_by(FloatingPointError("the loss is nan")), full, 0.75]
    machine, said = OneMachine(ends, told := []), []
    monkeypatch.setattr("sweeps.engine.after.final.ray", machine)
    monkeypatch.setattr("sweeps.engine.after.final.Queue", machine.queue)
    with pytest.raises(ConfigError) as refused:
        train_all(plan({"inflora": config}, range(6), tmp_path), Resources(), said.append)
    assert [line for line in said if "acc/final" in line][-1].endswith("acc/final 75.0 %  (6/6)")
    (line,) = str(refused.value).splitlines()
    assert line.startswith("4 of 6 runs have failed")
    assert [f"seed {seed} order" in line for seed in range(6)] == [False, True, True, True, True, False]
    assert "WorkerCrashedError" in line and "FloatingPointError: the loss is nan" in line and "CUDA out of" in line
    assert told[0]["scheduling_strategy"].node_id == "a1" * 28, "what passes lines on is lost with the driver alone"


@pytest.mark.cluster
def test_a_folder_with_another_run_in_it_ends_that_run_alone(config, tmp_path):
    bad, good = plan({"inflora": config}, [0, 1], tmp_path)
    bad.folder.mkdir(parents=True)
    (bad.folder / "result.json").write_text("{}")
    ray.init(address="local", num_cpus=1, log_to_driver=False, logging_level="ERROR")
    try:
        with pytest.raises(ConfigError, match=f"1 of 2 runs have failed.*{bad.folder} holds result.json and no run"):
            train_all([bad, good], Resources(), print)
    finally:
        ray.shutdown()
    assert result_in(good.folder)["metrics"]


def test_what_becomes_of_a_sweep_is_kept_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert home_of("results/digits", Path("/elsewhere")) == tmp_path / "results/digits"
    assert home_of("s3://bucket/sweeps/digits", tmp_path / "results") == tmp_path / "results/digits"
    assert home_of(None, tmp_path / "results") == tmp_path / "results"


@pytest.mark.cluster
def test_sweeps_final_brings_home_from_the_bucket_what_nodes_have_trained(config, bucket, data_root, tmp_path):
    (tmp_path / "tiny.yaml").write_text(dump_config(config))
    told = {**os.environ, "INFLORA_SHARED": f"{bucket}/sweeps", "INFLORA_STORAGE": str(tmp_path / "results")}
    command = [sys.executable, "-m", "sweeps.cli", "final", "tiny.yaml", "--seeds", "0"]
    done = subprocess.run(command, cwd=tmp_path, env=told, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    (kept,) = SharedFolder(f"{bucket}/sweeps").folders("final")
    home = tmp_path / "results" / "final" / kept / "seed-0"
    assert "result.json" in files_in(home)
    report = json.loads((tmp_path / "results/final/report.json").read_text())
    (values,) = report["summary"].values()
    assert values["acc/final"]["mean"] == pytest.approx(result_in(home)["metrics"]["acc/final"])


@pytest.mark.e2e
def test_a_sweep_in_a_bucket_is_found_and_a_folder_is_not_taken_for_a_bucket(bucket, tmp_path):
    for arguments, message in (
        ((f"{bucket}/sweeps/nothing",), "s3://bucket/sweeps/nothing"),
        (("best.yaml", "--shared", "/mnt/inflora"), "--shared must be s3://bucket/path, got '/mnt/inflora'"),
    ):
        command = [sys.executable, "-m", "sweeps.cli", "final", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.cluster
def test_a_sweep_that_is_in_a_bucket_alone_is_judged_and_trained(tiny_sweep, bucket, data_root, tmp_path):
    recipe = Recipe(tmp_path, tiny_sweep.model_copy(update={"trials": 2}), data_root)
    driver = recipe.start("--executor", "inline", "--shared", f"{bucket}/sweeps")
    assert driver.wait(timeout=200) == 0, recipe.log.read_text()
    elsewhere = {**os.environ, "INFLORA_SHARED": f"{bucket}/sweeps", "INFLORA_STORAGE": str(tmp_path / "elsewhere")}
    command = [sys.executable, "-m", "sweeps.cli", "final", f"{bucket}/sweeps/tiny", "--top", "1", "--seeds", "0"]
    done = subprocess.run(command, cwd=tmp_path, env=elsewhere, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    home = tmp_path / "elsewhere" / "tiny" / "final"
    winner = json.loads((home / "judged.json").read_text())["winner"]
    assert winner in json.loads((home / "report.json").read_text())["summary"]
    assert SharedFolder(f"{bucket}/sweeps/tiny").folders("judged"), "beside the sweep's trials"
