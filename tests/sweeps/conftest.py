"""A sweep small enough to run in seconds, and reports without training."""

import os
from pathlib import Path

import pytest

from inflora.config import BackboneSettings, DataSettings, InfLoRASettings, OptimSettings, RunConfig
from sweeps.engine.records import TaskReport
from sweeps.engine.spec import Integer, NearOne, Real, Sweep

PAPER = {"method.rank": 10, "method.energy": 0.95, "optim.lr": 5e-4}


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    os.environ["INFLORA_DATA"] = str(root)
    return root


@pytest.fixture
def tiny_sweep(data_root) -> Sweep:
    return Sweep(
        name="tiny",
        base=RunConfig(
            data=DataSettings(dataset="digits", tasks=5),
            backbone=BackboneSettings(pretrained=False, options={"embed_dim": 32, "depth": 2, "num_heads": 2}),
            method=InfLoRASettings(),
            optim=OptimSettings(epochs=1),
            device="cpu",
        ),
        space={
            "method.rank": Integer(low=1, high=16, log=True),
            "method.energy": NearOne(low=0.8, high=0.999),
            "optim.lr": Real(low=1e-4, high=1e-2, log=True),
        },
        first=(PAPER,),
        trials=4,
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


def learn_all(ledger, number: int, accuracies: list[float]) -> bool:
    """Report one accuracy per task and close the trial; whether the ledger stopped it on the way."""
    for done, accuracy in enumerate(accuracies, start=1):
        if ledger.report(number, report(done, accuracy)):
            return True
    ledger.close(number)
    return False
