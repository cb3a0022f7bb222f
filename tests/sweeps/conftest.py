"""A sweep small enough to run in seconds, and reports without training."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import ray
import torch
from ray.cluster_utils import Cluster as Nodes

from inflora.config import BackboneSettings, DataSettings, InfLoRASettings, OptimSettings, RunConfig
from inflora.continual import run
from inflora.storage import SharedFolder
from sweeps.engine.ledger.database import study_url
from sweeps.engine.ledger.lease import LEASE_FILE, this_process
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.records import TaskReport, TrialRecord
from sweeps.engine.ledger.trials import read_records
from sweeps.engine.run.nodes import Likeness, likeness
from sweeps.engine.run.watch import NodeWatch
from sweeps.engine.show import mlflow_database
from sweeps.engine.space.domains import Integer, NearOne, Real
from sweeps.engine.space.spec import Sweep

PAPER = {"adapter.rank": 10, "adapter.energy": 0.95, "optim.lr": 5e-4}


@pytest.fixture(scope="session", autouse=True)
def _one_new_database(tmp_path_factory) -> Iterator[None]:
    """MLflow needs a second for a new database; here the first one of a test process is copied."""
    new = tmp_path_factory.mktemp("mlflow") / "new.db"
    create = mlflow_database.create

    def copy(file: Path) -> None:
        if not new.exists():
            create(new)
        shutil.copy(new, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow_database, "create", copy)
        yield


@pytest.fixture(scope="session")
def tiny_sweep(data_root) -> Sweep:
    return Sweep(
        name="tiny",
        base=RunConfig(
            data=DataSettings(dataset="digits", tasks=5),
            backbone=BackboneSettings(pretrained=False, options={"embed_dim": 32, "depth": 2, "num_heads": 2}),
            adapter=InfLoRASettings(),
            optim=OptimSettings(epochs=1),
            device="cpu",
        ),
        space={
            "adapter.rank": Integer(low=1, high=16, log=True),
            "adapter.energy": NearOne(low=0.8, high=0.999),
            "optim.lr": Real(low=1e-4, high=1e-2, log=True),
        },
        first=(PAPER,),
        trials=4,
        sampler="tpe",
        early_stopping="asha",  # so that some trials are stopped
    )


def report(tasks_done: int, accuracy: float, tasks: int = 5) -> TaskReport:
    """What a trial would report after ``tasks_done`` tasks; the objective is there only after the last."""
    metrics = {"acc/seen": accuracy}
    if tasks_done == tasks:
        metrics["acc/final"] = accuracy
    return TaskReport(
        tasks_done=tasks_done,
        tasks=tasks,
        metrics=metrics,
        accuracies=[accuracy] * tasks_done,
        seconds=1.0,
        time_ms=1_700_000_000_000 + tasks_done,
    )


def learn_all(ledger, number: int, accuracies: list[float], after: int = 0) -> bool:
    """Report an accuracy per task, from ``after`` on, and close the trial; whether the ledger stopped it on the way."""
    for done, accuracy in enumerate(accuracies[after:], start=after + 1):
        if ledger.report(number, report(done, accuracy)):
            return True
    ledger.close(number)
    return False


class Anywhere:
    """Machines of which any will do."""

    likeness = Likeness("1", "digits", None, "abc")

    def to_avoid(self, record):
        return set()


def any_node(ledger: Ledger, folder: Path) -> NodeWatch:
    """The machines of a sweep in ``folder``, of which any will do that has this code."""
    return NodeWatch(ledger, SharedFolder(str(folder)), likeness(ledger.sweep.base.data), print)


class Recipe:
    """A recipe as a user has it: a script of its own in some folder, run by a Python of its own."""

    def __init__(self, folder: Path, sweep: Sweep, data_root: Path) -> None:
        self.sweep, self.folder = sweep, folder
        self.script = folder / "recipe.py"
        self.script.write_text(
            "from sweeps.recipe import Sweep, main\n\n"
            f"if __name__ == '__main__':\n    main(Sweep.model_validate_json({sweep.model_dump_json()!r}))\n"
        )
        self.environment = {
            **os.environ,
            "INFLORA_DATA": str(data_root),
            "INFLORA_STORAGE": str(folder / "results"),
            "RAY_ADDRESS": "local",
            "OMP_NUM_THREADS": "1",
        }
        self.log = folder / "log"

    @property
    def results(self) -> Path:
        return self.folder / "results" / self.sweep.name

    def start(self, *arguments: str, terminal: bool = False) -> subprocess.Popen:
        """Type the command, into a ``terminal`` of its own: its processes are then a group that hears Ctrl-C."""
        return subprocess.Popen(
            [sys.executable, str(self.script), *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=self.log.open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=terminal,
        )

    def run(self, *arguments: str) -> None:
        assert self.start(*arguments).wait(timeout=280) == 0, self.log.read_text()

    def wait_for(self, line: str, process: subprocess.Popen, times: int = 1) -> None:
        deadline = time.monotonic() + 200
        while len(re.findall(line, self.log.read_text())) < times:
            assert process.poll() is None, f"ended before {line!r}: {self.log.read_text()}"
            assert time.monotonic() < deadline, f"no {line!r} in {self.log.read_text()}"
            time.sleep(0.1)

    def records(self) -> list[TrialRecord]:
        return read_records(optuna.load_study(study_name=self.sweep.study_name, storage=study_url(self.results)))

    def learnt(self, number: int) -> list[int]:
        """The tasks that Tune was told of as just learnt, over all starts and tries of a trial."""
        lines = [json.loads(line) for file in self.results.glob("tune/*/result.json") for line in file.open()]
        of_trial = (each for each in lines if "report" in each and each["config"]["number"] == number)
        told = [TaskReport.model_validate_json(each["report"]) for each in of_trial]
        return sorted(report.tasks_done for report in told if report.seconds > 0)


@pytest.fixture
def recipe(tmp_path, tiny_sweep, data_root) -> Recipe:
    return Recipe(tmp_path, tiny_sweep, data_root)


def undisturbed(sweep: Sweep, settings: dict) -> list[list[float]]:
    """The accuracy matrix of these settings, learnt here and now with nothing around it."""
    torch.set_num_threads(1)
    return [result.accuracies for result in run(sweep.config(settings))]


def hold(place: SharedFolder) -> SharedFolder:
    """This process is the driver of the sweep in a place, as far as its lease says."""
    place.write(LEASE_FILE, this_process().model_dump_json().encode())
    return place


def sqlite(folder: Path) -> str:
    """MLflow's store in a folder."""
    return f"sqlite:///{folder / 'mlflow.db'}"


@pytest.fixture
def nodes(monkeypatch):
    """A head that trains nothing, and workers, as ``ray start`` is told.

    The head says how many trials the cluster has room for when it has grown (None: it does not grow), and may drive
    some itself. ``nodes.cluster`` is there to add others.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cluster = Nodes()

    def start(at_a_time, *workers, head_drives=0):
        declared = {"trials_at_a_time": at_a_time, "trial_driver": head_drives}
        cluster.add_node(
            num_cpus=0,
            num_gpus=0,
            resources={name: count for name, count in declared.items() if count},
        )
        for worker in workers:
            cluster.add_node(**worker)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        cluster.wait_for_nodes()
        return cluster.address

    start.cluster = cluster
    yield start
    ray.shutdown()
    cluster.shutdown()
