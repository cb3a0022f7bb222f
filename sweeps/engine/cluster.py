"""Where a sweep runs: the Ray cluster it connects to, and how many trials find room there."""

import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import ray
from ray.util.state import list_actors

from inflora.config import ConfigError
from sweeps.engine.spec import Resources

# Ray Train's start and stop are most of a short trial; these only switch off what a sweep does not use.
_QUICK_TRAIN = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}
# A trial that waits for room is not late: its place in the queue is what the cluster grows for. A new GPU node takes
# minutes; giving the place up and asking again every minute would make the cluster shrink and grow.
_PATIENT_TRAIN = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "3600"}
_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_WARN_SLOW_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "60",
}

STATE_API_PATIENCE_S = 30
"""How long the state API may take to answer at all."""

DRIVER = "trial_driver"
"""The custom resource by which a cluster's head says how many trials it drives at a time."""


class Cluster(NamedTuple):
    """Where a sweep runs, and where it keeps its trials so that every node finds them.

    ``address`` None is the cluster found, else this machine; ``shared`` None is the sweep's own folder; ``at_a_time``
    None is what the cluster declares or has room for.
    """

    address: str | None = None
    shared: str | None = None
    at_a_time: int | None = None


THIS_MACHINE = Cluster()


def connect(address: str | None) -> None:
    """Connect to a Ray cluster, or start one on this machine.

    The dashboard stays on (loopback): without its state API a stopped trial's workers are never released.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    environment = {
        name: os.environ.get(name, value) for name, value in (_QUICK_TRAIN | _PATIENT_TRAIN | _QUIET).items()
    }
    try:
        ray.init(
            address=address,
            runtime_env={"env_vars": environment},
            logging_level=logging.ERROR,
            log_to_driver=False,
            ignore_reinit_error=True,
        )
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"no Ray cluster at address {address!r}: {' '.join(str(error).split())[:200]}") from None


def check_state_api() -> None:
    """Raise ConfigError unless the cluster's state API answers: Train needs it to release a stopped trial's workers."""
    try:
        list_actors(limit=1, timeout=STATE_API_PATIENCE_S)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"Ray's state API does not answer ({reason}); start Ray with its dashboard, one cluster per machine, "
            "or use --executor inline"
        ) from None


def trials_at_a_time(resources: Resources, say: Callable[[str], None]) -> int:
    """As many as the cluster declares drivers for, else as many as its nodes have room for.

    A cluster that declares them may grow: a trial then waits for its nodes, however long they take.

    Raises:
        ConfigError: Nothing is declared and there is no room for a single trial.
    """
    declared = int(ray.cluster_resources().get(DRIVER, 0))
    if not declared:
        return slots(resources)
    try:
        slots(resources)
    except ConfigError as error:
        say(f"waiting for nodes: {error}")
    return declared


def slots(resources: Resources) -> int:
    """How many trials the nodes that are there can train at a time.

    Raises:
        ConfigError: Not even one.
    """
    needs = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    workers = sum(int(min(node.get(name, 0) / need for name, need in needs.items() if need)) for node in nodes)
    if workers < resources.workers:
        largest = {name: max((node.get(name, 0) for node in nodes), default=0) for name in needs}
        raise ConfigError(
            f"a trial needs {resources.workers} workers of {needs['CPU']} CPUs and {needs['GPU']:g} GPUs, the cluster "
            f"has room for {workers}: {len(nodes)} nodes of at most {largest['CPU']:g} CPUs and {largest['GPU']:g} GPUs"
        )
    return workers // resources.workers
