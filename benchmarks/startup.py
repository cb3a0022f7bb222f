"""What passes between Tune's decision for a trial and its first training step, through Ray Train and inline.

python benchmarks/startup.py            two sweeps of three trials of the digits; a table, and benchmarks/startup.json

The first trial of a sweep pays for processes that the later ones find; every trial has a line. Nothing is shared
between the trials but what the machine keeps by itself (page cache, warm processes).
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ray import tune
from rich.console import Console
from rich.table import Table

from inflora.storage import SharedFolder
from sweeps.digits import inflora as digits
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.run import driver
from sweeps.engine.run.cluster import connect
from sweeps.engine.run.nodes import likeness
from sweeps.engine.run.tune import run_trials
from sweeps.engine.run.watch import NodeWatch
from sweeps.engine.space.spec import Sweep

MOMENTS = ("driver", "process", "worker", "checked", "data", "backbone", "model", "step")
"""Each is the end of one part: Tune has called the trial; the worker's process exists; it has imported everything and
is called; the settings are checked; the stream is open; the backbone is built, and made adaptable; the first adapters
are designed and the first step begins."""


def stamped(number: int, file: str, learn: Callable[[], None], *, process: bool) -> None:
    """``learn`` with the moments of its beginning written to ``file``; steps do nothing."""
    driver.import_trial()  # before anything else: importing torch is a part of the worker's start
    import psutil
    import torch

    from inflora import continual, training

    def stamp(moment: str, at: float | None = None) -> None:
        with Path(file).open("a") as out:
            out.write(json.dumps([number, moment, at or time.time()]) + "\n")

    def after(moment: str, module: Any, name: str) -> None:
        whole = getattr(module, name)

        def then_stamped(*args: Any, **options: Any) -> Any:
            result = whole(*args, **options)
            stamp(moment)
            return result

        originals.append((module, name, whole))
        setattr(module, name, then_stamped)

    def first_step(*_: Any) -> torch.Tensor:
        stamp("step")
        return torch.zeros(())

    originals: list[tuple[Any, str, Any]] = [(training, "train_step", training.train_step)]
    if process:
        stamp("process", psutil.Process().create_time())
    stamp("worker")
    try:
        training.train_step = first_step
        after("checked", continual, "check")
        after("data", continual, "make_stream")
        after("backbone", continual, "build_backbone")
        after("model", continual, "keys_of")
        learn()
    finally:
        for module, name, whole in originals:
            setattr(module, name, whole)


def stamped_trial(sweep: Sweep, folder: str, file: str) -> Callable[[dict[str, Any]], None]:
    """The product's own trial of either kind, stamped."""

    def trial(settings: dict[str, Any]) -> None:
        number = settings["number"]
        with Path(file).open("a") as out:
            out.write(json.dumps([number, "driver", time.time()]) + "\n")
        if sweep.executor == "inline":
            from sweeps.engine.run.trial import inline_trial

            whole = inline_trial(sweep.resources, folder)
            stamped(number, file, lambda: whole(settings), process=False)
            return
        train_worker = driver._train_worker
        driver._train_worker = lambda given: stamped(number, file, lambda: train_worker(given), process=True)
        try:
            driver.train_driver(sweep.resources, "cpu", folder)(settings)
        finally:
            driver._train_worker = train_worker

    return trial


def measure(executor: str, trials: int) -> list[dict[str, float]]:
    """For each trial the seconds of every part, in order, and their sum."""
    base = digits.base.model_copy(update={"device": "cpu", "optim": digits.base.optim.model_copy(update={"epochs": 1})})
    sweep = digits.model_copy(update={"base": base, "executor": executor, "trials": trials, "protocol": "first-task"})
    with tempfile.TemporaryDirectory() as name:
        folder, file = Path(name), Path(name) / "moments"
        ledger = Ledger(sweep, folder)
        needs = {"CPU": 1} if executor == "inline" else {"node:__internal_head__": 0.001}
        trainable = tune.with_resources(stamped_trial(sweep, str(folder / "trials"), str(file)), needs)
        nodes = NodeWatch(ledger, SharedFolder(str(folder)), likeness(ledger.sweep.base.data), print)
        run_trials(ledger, folder, trainable, 1, lambda line: None, nodes)
        stamps: dict[int, dict[str, float]] = {}
        for line in file.read_text().splitlines():
            number, moment, at = json.loads(line)
            stamps.setdefault(number, {}).setdefault(moment, at)
        return [parts(record.start_ms / 1000, stamps[record.number]) for record in ledger.records()]


def parts(decided: float, stamps: dict[str, float]) -> dict[str, float]:
    """Seconds from each moment to the next; a process that was there before the decision took none."""
    lasted, before = {}, decided
    for moment in MOMENTS:
        at = max(before, stamps.get(moment, before))
        lasted[moment], before = at - before, at
    return lasted | {"all": before - decided}


def main() -> None:
    """Measure both executors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/startup.json"))
    arguments = parser.parse_args()
    connect("local", print)
    found = {executor: measure(executor, arguments.trials) for executor in ("inline", "train")}
    table = Table(title="seconds from Tune's decision to the first training step, digits")
    for column in ("", *MOMENTS, "all"):
        table.add_column(column, justify="right" if column else "left")
    for executor, rows in found.items():
        for index, row in enumerate(rows):
            table.add_row(f"{executor}, trial {index + 1}", *(f"{value:.2f}" for value in row.values()))
    Console(width=120).print(table)
    facts = {"date": date.today().isoformat(), "torch": version("torch")}
    arguments.out.write_text(json.dumps({**facts, **found}, indent=2))


if __name__ == "__main__":
    main()
