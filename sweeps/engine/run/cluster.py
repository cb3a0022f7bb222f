"""Where a sweep runs: the Ray cluster it connects to, and how many trials find room there."""

import logging
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import ray
from ray._private import ray_constants

from inflora.config import ConfigError
from sweeps.engine.space.spec import Resources

# Ray Train's start and stop are most of a short trial; these only switch off what a sweep does not use. As nobody
# watches for drained nodes, a trial on one learns on until the machine goes.
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

_ADDRESS, _OWN = "RAY_ADDRESS", "local"
"""Where Ray and everything that belongs to it look for an address, and the one that means a new Ray."""

DRIVER = "trial_driver"
"""The custom resource by which a machine says how many trials' drivers it takes: as many as it trains at a time.

A trial through Ray Train costs its driver's machine six processes. Where a machine trains what it drives, those of a
hundred trials are on a hundred machines, and a machine that is lost takes one trial's with it.
"""
AT_A_TIME = "trials_at_a_time"
"""The custom resource, asked for by nobody, with which the head of a cluster that grows says how far it does."""
HEAD = "node:__internal_head__"
"""Ray's own resource, which the head alone has."""
_DRIVER_GB = 0.65


class Cluster(NamedTuple):
    """Where a sweep runs, and where it keeps its trials so that every node finds them.

    ``address`` None is that of ``RAY_ADDRESS``, else a Ray of the sweep's own on this machine; ``shared`` None is the
    sweep's own folder; ``at_a_time`` None is what the cluster declares or has room for. ``study`` is the address of a
    database for the study, None a file in the sweep's folder.
    """

    address: str | None = None
    shared: str | None = None
    at_a_time: int | None = None
    study: str | None = None


THIS_MACHINE = Cluster()


def connect(address: str | None, say: Callable[[str], None]) -> None:
    """Join the Ray at ``address``, or at ``RAY_ADDRESS``; where neither is given, start one of its own on this machine.

    Another Ray that happens to run here may be anybody's.
    """
    if ray.is_initialized():
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    environment = {
        name: os.environ.get(name, value) for name, value in (_QUICK_TRAIN | _PATIENT_TRAIN | _QUIET).items()
    }
    # A driver under `uv run` would make Ray copy the checkout and build a second environment for the workers out of it.
    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    chosen = _chosen(address)
    try:
        ray.init(
            address=chosen,
            runtime_env={"env_vars": environment},
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"no Ray cluster at address {chosen!r}: {' '.join(str(error).split())[:200]}") from None
    say(f"Ray: {'started on this machine' if chosen == _OWN else f'joined {_address()}'} ({_room()})")


def _chosen(address: str | None) -> str:
    """The Ray to join, or the one that is started here."""
    return address or os.environ.get(_ADDRESS) or _OWN


def require_gpus(resources: Resources, address: str | None) -> None:
    """Raise ConfigError where trials need GPUs and a Ray that starts here would have none; takes hold of no GPU."""
    import torch  # not in the processes that only drive trials

    told = address or os.environ.get(_ADDRESS) or ray.is_initialized()
    if resources.gpus and not told and not torch.cuda.is_available():
        raise ConfigError(
            f"a trial needs {resources.gpus:g} GPUs and this machine has none: --gpus 0 trains on the CPU, --address "
            "or RAY_ADDRESS names a cluster"
        )


def _address() -> str:
    """Of the Ray that is connected to."""
    return str(ray.get_runtime_context().gcs_address)


def _room() -> str:
    has, machines = ray.cluster_resources(), sum(node["Alive"] for node in ray.nodes())
    counts = {"machine": machines if machines > 1 else 0, "CPU": has.get("CPU", 0), "GPU": has.get("GPU", 0)}
    return ", ".join(f"{count:g} {name}{'' if count == 1 else 's'}" for name, count in counts.items() if count)


def trials_at_a_time(resources: Resources, executor: str, say: Callable[[str], None]) -> int:
    """As many as the cluster declares, else as many as its nodes have room for.

    A cluster that declares a number may grow: a trial then waits for its nodes, however long they take.

    Raises:
        ConfigError: Nothing is declared and there is no room for a single trial.
    """
    if not resources.gpus and has_gpus():
        say("Ray: no GPU is asked for (--gpus), so device auto is the CPU")
    if not may_grow():
        room, drivers = slots(resources), int(ray.cluster_resources().get(DRIVER, 0))
        if executor == "train" and 0 < drivers < room:
            say(f"the machines have room for {room} trials and drive {drivers} ({DRIVER})")
            return drivers
        return room
    try:
        slots(resources)
    except ConfigError as error:
        say(f"waiting for nodes: {error}")
    return int(ray.cluster_resources()[AT_A_TIME])


def has_gpus() -> bool:
    """True of a cluster with GPUs on the machines that are there."""
    return bool(ray.cluster_resources().get("GPU"))


def gpus_of_a_run(address: str | None) -> int:
    """The GPUs that a run asks for where nobody has said how many: one where there are some.

    One of this machine, where Ray is its own, must be one that PyTorch can use.

    Raises:
        ConfigError: There is none now, but the cluster may get some.
    """
    import torch  # not in the processes that only drive trials

    if has_gpus():
        return int(_chosen(address) != _OWN or torch.cuda.is_available())
    if may_grow():
        raise ConfigError("the cluster has no GPU now and may get some: say --gpus 1, or --gpus 0 for the CPU")
    return 0


def may_grow() -> bool:
    """True of a cluster that declares how many trials it trains at a time: machines come as they are wanted."""
    return bool(ray.cluster_resources().get(AT_A_TIME, 0))


def has_drivers() -> bool:
    """True where machines that train also drive, and a trial's driver need not be on the head."""
    return may_grow() or bool(ray.cluster_resources().get(DRIVER, 0))


def why_too_many_to_drive(at_a_time: int) -> str:
    """Why the head cannot drive so many trials of Ray Train; empty if it can, or need not."""
    head: dict[str, float] = next((n["Resources"] for n in ray.nodes() if HEAD in n["Resources"]), {})
    needs_gb, has_gb = at_a_time * _DRIVER_GB, head.get("memory", math.inf) / 2**30
    if has_drivers() or needs_gb <= has_gb:
        return ""
    return (
        f"{at_a_time} trials at a time need {needs_gb:.0f} GB of the head, which has {has_gb:.0f}: machines that train "
        f"can drive (ray start --resources='{{\"{DRIVER}\": 1}}', as many as they train at a time)"
    )


def slots(resources: Resources) -> int:
    """The number of trials that the nodes which are there can train at a time.

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
