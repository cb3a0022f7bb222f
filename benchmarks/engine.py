"""What the engine itself costs: a sweep whose trials learn nothing, with and without MLflow.

python benchmarks/engine.py                    1,000 trials x 10 tasks, the ledger alone, then with MLflow beside it
python benchmarks/engine.py --ray --trials 200 the same through Ray Tune, in actors that are used again
python benchmarks/engine.py --at-a-time 256    so many trials side by side that sleep, on GPUs in name only

Prints a table and writes it as JSON. Both kinds of sweep take turns, each time in a fresh process; each figure is a
median over the rounds, and the ratio is the median of the rounds' ratios. Driver time is wall time from the first
proposal to the last trial's end; ``mlflow_after_s`` is what the tracker needs after that until all is delivered,
``mlflow_cpu_s`` its process's own time, start included, ``mlflow_mb`` what it holds.

Trials at a time: ``driver_share`` is the part of one core that the driver takes while all of them run, with MLflow
beside it; a trial that reports is held up until Tune has answered, and ``answer_s`` is how long, while all run;
``starting_max_s`` is the longest before, while this machine starts their processes. ``head_mb`` is what the driver and
Ray's own processes hold for each trial, those of the trials themselves left out. A trial's process holds 115 MB: swap
space and RAY_memory_monitor_refresh_ms=0 make room for those that sleep.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import optuna
import psutil
import ray
from rich.console import Console
from rich.table import Table
from sleeping import sleeper

from inflora.config import DataSettings, RunConfig
from inflora.storage import SharedFolder
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.records import TaskReport, now_ms
from sweeps.engine.run.cluster import connect
from sweeps.engine.run.nodes import likeness
from sweeps.engine.run.tune import run_trials
from sweeps.engine.run.watch import NodeWatch
from sweeps.engine.show.progress import Callback
from sweeps.engine.show.tracking import Tracker
from sweeps.engine.space.domains import Integer, NearOne, Real
from sweeps.engine.space.spec import Resources, Sweep


def make_sweep(trials: int, tasks: int, sampler: str) -> Sweep:
    """A sweep of the usual three settings; its trials are never trained."""
    return Sweep.model_validate(
        {
            "name": "bench",
            "base": RunConfig(data=DataSettings(tasks=tasks)),
            "space": {
                "adapter.rank": Integer(low=1, high=96, log=True),
                "adapter.energy": NearOne(low=0.8, high=0.9999),
                "optim.lr": Real(low=1e-5, high=1e-1, log=True),
            },
            "trials": trials,
            "sampler": sampler,
            "executor": "inline",
        }
    )


def make_report(done: int, tasks: int, lr: float) -> TaskReport:
    """What a trial says after ``done`` tasks: less with every task, and less the further its rate is from 1e-3."""
    accuracy = max(0.0, 1.0 - 0.03 * done - abs(lr - 1e-3) * 5)
    metrics = dict.fromkeys(("acc/seen", "acc/seen_macro", "acc/new", "acc/task_aware"), accuracy)
    if done == tasks:
        metrics |= {"acc/final": accuracy, "acc/avg_incremental": accuracy, "forgetting": 0.1, "bwt": -0.1}
    return TaskReport(
        tasks_done=done, tasks=tasks, metrics=metrics, accuracies=[accuracy] * done, seconds=0.0, time_ms=now_ms()
    )


def drive(ledger: Ledger, tasks: int) -> None:
    """Every trial of the ledger, one after another, in this process."""
    while (proposal := ledger.propose()) is not None:
        for done in range(1, tasks + 1):
            if ledger.report(proposal.number, make_report(done, tasks, proposal.settings["optim.lr"])):
                break
        ledger.close(proposal.number)


def drive_with_ray(ledger: Ledger, folder: Path, tasks: int) -> None:
    """The same through Ray Tune, two at a time."""
    from ray import tune

    def trial(settings: dict) -> None:
        for done in range(1, tasks + 1):
            report = make_report(done, tasks, settings["config"]["optim"]["lr"])
            tune.report({**report.metrics, "tasks_done": done, "report": report.model_dump_json()})

    nodes = NodeWatch(ledger, SharedFolder(str(folder)), likeness(ledger.sweep.base.data), print)
    run_trials(ledger, folder, tune.with_resources(trial, {"CPU": 1}), 2, lambda line: None, nodes)


def measure(sweep: Sweep, with_mlflow: bool, with_ray: bool) -> dict[str, float]:
    """One sweep from start to end, in a process that has done nothing else."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if with_ray:
        connect("local", lambda line: None)
    tasks, process = sweep.base.data.task_count, psutil.Process()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ledger = Ledger(sweep, folder)
        tracker = Tracker(sweep, folder, f"sqlite:///{folder / 'mlflow.db'}", {})
        memory_mb, start = process.memory_info().rss / 2**20, time.perf_counter()
        if with_mlflow:
            tracker.start()
        if with_ray:
            drive_with_ray(ledger, folder, tasks)
        else:
            drive(ledger, tasks)
        driver_s = time.perf_counter() - start
        tracker_mb = psutil.Process(tracker.pid).memory_info().rss / 2**20 if with_mlflow else 0.0
        start = time.perf_counter()
        delivered = tracker.close(patience_s=3600) if with_mlflow else True
        after_s = time.perf_counter() - start
        tracker_took = resource.getrusage(resource.RUSAGE_CHILDREN)  # of children that have ended: the tracker's
        assert delivered, "MLflow has not taken everything"
        records = ledger.records()
        assert len(records) == sweep.trials
        assert not ledger.remaining()
        return {
            "trials": sweep.trials,
            "reports": sum(len(record.reports) for record in records),
            "driver_s": driver_s,
            "per_trial_ms": 1000 * driver_s / sweep.trials,
            "mlflow_cpu_s": tracker_took.ru_utime + tracker_took.ru_stime,
            "mlflow_after_s": after_s,
            "mlflow_mb": tracker_mb,
            "driver_growth_mb": process.memory_info().rss / 2**20 - memory_mb,
        }


class Steady(Callback):
    """The driver's processor time, and the head's memory, from when all trials run until the first ends."""

    def __init__(self, at_a_time: int) -> None:
        self.at_a_time, self.process = at_a_time, psutil.Process()
        self.begun: tuple[float, float] | None = None
        self.last = (0.0, 0.0)
        self.head_mb = 0.0

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict, **info: Any) -> None:
        if sum(each.status == "RUNNING" for each in trials) < self.at_a_time:
            return
        times = self.process.cpu_times()
        self.last = (time.time(), times.user + times.system)
        if self.begun is None:
            self.begun, self.head_mb = self.last, head_memory_mb(self.process)


def head_memory_mb(driver: psutil.Process) -> float:
    """What the driver and Ray's own processes hold, but for the processes of trials and those kept for them."""
    ray_s = [p for p in driver.children(recursive=True) if not any("ray::" in part for part in p.cmdline()[:1])]
    held = [process.memory_full_info() for process in [driver, *ray_s]]
    return sum(each.rss + each.swap for each in held) / 2**20


def measure_crowd(at_a_time: int, tasks: int, seconds: float) -> dict[str, float]:
    """A sweep of so many trials at a time, in a process that has done nothing else."""
    from ray import tune

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ray.init("local", num_cpus=at_a_time, num_gpus=at_a_time, include_dashboard=False, log_to_driver=False)
    sweep = make_sweep(at_a_time, tasks, "random").model_copy(
        update={"resources": Resources(gpus_per_worker=1), "early_stopping": "none"}
    )
    before_mb, steady = head_memory_mb(psutil.Process()), Steady(at_a_time)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ledger = Ledger(sweep, folder)
        tracker = Tracker(sweep, folder, f"sqlite:///{folder / 'mlflow.db'}", {})
        tracker.start()
        nodes = NodeWatch(ledger, SharedFolder(str(folder)), likeness(sweep.base.data), print)
        trainable = tune.with_resources(sleeper(tasks, seconds), {"CPU": 1, "GPU": 1})
        start = time.time()
        run_trials(ledger, folder, trainable, at_a_time, lambda line: None, nodes, [steady])
        wall_s = time.time() - start
        tracker.close(patience_s=3600)
        records = ledger.records()
    pairs = [pair for record in records for pair in pairwise(record.reports)]
    assert steady.begun is not None, "never did all of them run"
    (all_run, cpu_before_s), (one_ends, cpu_after_s) = steady.begun, steady.last
    answers, starting = sorted(_answers(pairs, all_run, one_ends)), _answers(pairs, start, all_run)
    failed = [f"{record.number} {record.outcome}: {record.tries}" for record in records if record.value is None]
    assert not failed, failed
    return {
        "trials": at_a_time,
        "reports_per_s": at_a_time / seconds,
        "wall_s": wall_s,
        "all_run_after_s": all_run - start,
        "driver_share": (cpu_after_s - cpu_before_s) / (one_ends - all_run),
        "answer_s": median(answers),
        "answer_p99_s": answers[int(0.99 * len(answers))],
        "answer_max_s": answers[-1],
        "starting_max_s": max(starting, default=0.0),
        "head_mb": (steady.head_mb - before_mb) / at_a_time,
    }


def _answers(pairs: Iterable[tuple[TaskReport, TaskReport]], since: float, until: float) -> list[float]:
    """How long reports between two times (s) were held up: each report tells it of the one before."""
    return [after.metrics["answer_s"] for before, after in pairs if since <= before.time_ms / 1000 < until]


def in_a_process_of_its_own(measured: Callable[..., dict[str, float]], *given: Any) -> dict[str, float]:
    """What ``measured`` says there."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        return processes.submit(measured, *given).result()


def show_crowd(arguments: argparse.Namespace) -> None:
    """Measure many trials at a time, and say it."""
    row = in_a_process_of_its_own(measure_crowd, arguments.at_a_time, arguments.tasks, arguments.seconds)
    table = Table(title=f"{arguments.at_a_time} trials at a time, {arguments.tasks} tasks of {arguments.seconds:g} s")
    for column in row:
        table.add_column(column, justify="right")
    table.add_row(*(f"{value:.3g}" for value in row.values()))
    Console(width=140).print(table)
    facts = {"arguments": {**vars(arguments), "out": str(arguments.out)}, **row}
    arguments.out.with_stem("engine_at_a_time").write_text(json.dumps(facts, indent=2))


def main() -> None:
    """Measure without and with MLflow, and say both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--sampler", default="random", help="random isolates the engine: TPE's own time grows")
    parser.add_argument("--ray", action="store_true", help="through Ray Tune")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/engine.json"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--at-a-time", type=int, help="trials that sleep side by side, instead of the rest")
    parser.add_argument("--seconds", type=float, default=20.0, help="that a sleeping trial's task takes")
    arguments = parser.parse_args()
    if arguments.at_a_time:
        show_crowd(arguments)
        return
    sweep = make_sweep(arguments.trials, arguments.tasks, arguments.sampler)
    kinds = {"without MLflow": False, "with MLflow": True}
    rounds = []
    for index in range(arguments.rounds):
        turns = [*kinds][:: -1 if index % 2 else 1]  # what was run first in one round is run last in the next
        rounds.append({name: in_a_process_of_its_own(measure, sweep, kinds[name], arguments.ray) for name in turns})
    rows = {name: {key: median(each[name][key] for each in rounds) for key in rounds[0][name]} for name in kinds}
    ratio = median(each["with MLflow"]["driver_s"] / each["without MLflow"]["driver_s"] for each in rounds)
    table = Table(title=f"{arguments.trials} trials x {arguments.tasks} tasks, sampler {arguments.sampler}")
    for column in ("", *rows["with MLflow"]):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()))
    console = Console(width=140)
    console.print(table)
    console.print(f"driver time with / without MLflow: {ratio:.3f}")
    facts = {"arguments": {**vars(arguments), "out": str(arguments.out)}, "ratio": ratio}
    arguments.out.write_text(json.dumps({**facts, **rows, "rounds": rounds}, indent=2))


if __name__ == "__main__":
    main()
