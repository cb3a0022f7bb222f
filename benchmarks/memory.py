"""The memory of a cluster's machines while trials run on them: the head, and four that train, all on this machine.

python benchmarks/memory.py                    64 trials inline that sleep, then 16 through Ray Train that learn

A row for every machine, taken once all trials run: the processes of trials there (with Ray Train a trial's driver, its
controller and its worker) and Ray's own, and what they hold. Memory is proportional set size: what processes share is
counted once. The driver's process is the head's, MLflow is not asked.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import optuna
import psutil
import ray
from engine import in_a_process_of_its_own, make_sweep
from ray import tune
from ray.cluster_utils import Cluster as Nodes
from rich.console import Console
from rich.table import Table
from sleeping import sleeper

from inflora.config import override
from inflora.storage import SharedFolder
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.run.cluster import AT_A_TIME, DRIVER, connect
from sweeps.engine.run.nodes import likeness
from sweeps.engine.run.placement import placed_trainable
from sweeps.engine.run.tune import run_trials
from sweeps.engine.run.watch import NodeWatch
from sweeps.engine.show.progress import Callback
from sweeps.engine.space.spec import Resources, Sweep

MACHINES = 4
STORE_BYTES = 100 * 2**20


def processes_of(raylet: int) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """The processes of trials on a machine, and Ray's own."""
    everything = [psutil.Process(raylet), *psutil.Process(raylet).children(recursive=True)]
    of_trials = [process for process in everything if is_of_trial("".join(process.cmdline()[:1]))]
    return of_trials, [process for process in everything if process not in of_trials]


def is_of_trial(command: str) -> bool:
    """True of an actor's process; Ray's agents have such names too, and so has a worker that waits for work."""
    return command.startswith("ray::") and not any(each in command for each in ("Agent", "ray::IDLE"))


def megabytes(processes: list[psutil.Process]) -> float:
    """Proportional set size."""
    return sum(process.memory_full_info().pss for process in processes) / 2**20


class Weighing(Callback):
    """Weighs all machines once: when every trial has reported a task and all of them run."""

    def __init__(self, cluster: Nodes, at_a_time: int) -> None:
        self.cluster, self.at_a_time = cluster, at_a_time
        self.reported: set[str] = set()
        self.machines: list[dict[str, float]] = []

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict, **info: Any) -> None:
        self.reported |= {trial.trial_id} if "report" in result else set()
        running = sum(each.status == "RUNNING" for each in trials)
        if not self.machines and running == len(self.reported) == self.at_a_time:
            self.machines = [self._weigh(node) for node in self.cluster.list_all_nodes()]

    def _weigh(self, node: Any) -> dict[str, float]:
        of_trials, own = processes_of(node.all_processes["raylet"][0].process.pid)
        if node.head:
            own += [psutil.Process(node.all_processes["gcs_server"][0].process.pid), psutil.Process()]
        return {
            "head": float(node.head),
            "trial_processes": float(len(of_trials)),
            "trials_mb": megabytes(of_trials),
            "own_mb": megabytes(own),
        }


def measure(sweep: Sweep, at_a_time: int, seconds: float | None) -> list[dict[str, float]]:
    """Every machine of a cluster that runs so many trials at a time; ``seconds`` for a task that sleeps."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    each = at_a_time // MACHINES
    cluster = Nodes()
    cluster.add_node(num_cpus=0, num_gpus=0, resources={AT_A_TIME: at_a_time}, object_store_memory=STORE_BYTES)
    for _ in range(MACHINES):
        offered = {"num_cpus": each, "num_gpus": each, "resources": {DRIVER: each}}
        cluster.add_node(**offered, object_store_memory=STORE_BYTES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        connect(cluster.address, lambda line: None)
        ledger, weighing = Ledger(sweep, folder), Weighing(cluster, at_a_time)
        nodes = NodeWatch(ledger, SharedFolder(str(folder)), likeness(sweep.base.data), print)
        trainable = placed_trainable(sweep, str(folder))
        if seconds is not None:
            trainable = tune.with_resources(sleeper(5, seconds), {"CPU": 1, "GPU": 1})
        run_trials(ledger, folder, trainable, at_a_time, lambda line: None, nodes, [weighing])
        failed = [record for record in ledger.records() if record.value is None]
    ray.shutdown()
    cluster.shutdown()
    assert not failed, failed
    return weighing.machines


def show(title: str, machines: list[dict[str, float]]) -> None:
    """One table: the head, then the machines that train."""
    table = Table("", "processes of trials", "they hold, MB", "Ray and the driver, MB", title=title)
    for index, row in enumerate(machines):
        name = "head" if row["head"] else f"machine {index}"
        table.add_row(name, f"{row['trial_processes']:.0f}", f"{row['trials_mb']:.0f}", f"{row['own_mb']:.0f}")
    Console(width=100).print(table)


def sweep_of(executor: str, trials: int, epochs: int) -> Sweep:
    """A sweep of five tasks on digits, each trial on a GPU in name only."""
    sweep = make_sweep(trials, 5, "random")
    base = override(sweep.base, {"device": "cpu", "optim.epochs": epochs})
    resources = Resources(gpus_per_worker=1)
    return sweep.model_copy(
        update={"executor": executor, "resources": resources, "early_stopping": "none", "base": base}
    )


def main() -> None:
    """Weigh both kinds, and say it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inline", type=int, default=64, help="trials inline that sleep")
    parser.add_argument("--train", type=int, default=16, help="trials through Ray Train that learn")
    parser.add_argument("--seconds", type=float, default=20.0, help="that a sleeping trial's task takes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/memory.json"))
    arguments = parser.parse_args()
    inline = sweep_of("inline", arguments.inline, 1), arguments.inline, arguments.seconds
    train = sweep_of("train", arguments.train, 5), arguments.train, None
    found = {}
    for title, given in {"inline, asleep": inline, "through Ray Train": train}.items():
        found[title] = in_a_process_of_its_own(measure, *given)
        show(f"{given[1]} trials {title}", found[title])
    arguments.out.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
