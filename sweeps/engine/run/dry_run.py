"""Before anything is spent: does all that a sweep needs work, and what will it cost?"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ray
import torch

from inflora.config import ConfigError, RunConfig, override
from inflora.continual import run
from inflora.errors import one_line, without_password
from inflora.gpu_check import BEYOND_A_TRIAL, CHECKS
from inflora.isolated import Device, Outcome, Verdict, run_checks
from inflora.setup import check
from sweeps.engine.ledger.database import chosen_url, file_of
from sweeps.engine.run.cluster import Cluster, require_gpus
from sweeps.engine.run.machines import Rate, rate
from sweeps.engine.run.nodes import check_nodes
from sweeps.engine.run.preflight import check_folder, doubts, find_room, trials_place
from sweeps.engine.run.reach import reachable_store
from sweeps.engine.space.spec import Sweep

_EPOCHS = 2


class Timing(NamedTuple):
    """The seconds of one task: an epoch of training, and everything else (covariances, evaluation)."""

    epoch_s: float
    rest_s: float


class Forecast(NamedTuple):
    """The cost of a sweep if no trial is stopped early."""

    trial_s: float
    hours: float
    gpu_hours: float


def dry_run(sweep: Sweep, folder: Path, uri: str, *, cluster: Cluster, say: Callable[[str], None]) -> Forecast:
    """Check everything in turn, run the first task of one trial for two epochs, and say what to expect.

    Nothing is left behind in ``folder``.

    Raises:
        ConfigError: The first thing that does not work.
    """
    require_gpus(sweep.resources, cluster.address)
    configs = sweep.extreme_configs()
    for config in configs:
        check(config)
    data, backbone = sweep.base.data, sweep.base.backbone
    say(f"settings: {len(configs)} configs at the ends of the space fit {data.dataset} and {backbone.name}")
    check_folder(sweep, folder, cluster)
    study = chosen_url(folder, cluster.study)
    place, _ = trials_place(sweep, folder, cluster)
    say(f"storage: {folder} can be written, {'a database works there' if file_of(study) else f'{study} answers'}")
    reachable_store(uri, folder)
    say(f"tracking: {without_password(uri)} answers")
    try:
        at_a_time = find_room(sweep, cluster, say)
        check_nodes(place)
        say(f"cluster: room for {at_a_time} trials at a time")
        for doubt in doubts(sweep, min(at_a_time, sweep.trials)):
            say(f"cluster: {doubt}")
        options = {"num_cpus": sweep.resources.cpus_per_worker, "num_gpus": sweep.resources.gpus_per_worker}
        if sweep.resources.gpus and sweep.base.device != "cpu":
            check_gpu_node(options, "cuda", say)
        first = sweep.config(sweep.first[0]) if sweep.first else configs[0]
        task = ray.remote(_time_here).options(**options)
        timing, node_id = ray.get(task.remote(sweep.resources.on_device(first), sweep.resources.cpus_per_worker))
        prices = rate(sweep.resources, ray.nodes(), node_id)
    except ray.exceptions.RayError as error:
        raise ConfigError(f"a tiny trial failed: {one_line(str(getattr(error, 'cause', error)), 300)}") from None
    finally:
        ray.shutdown()
    say(f"a tiny trial: {timing.epoch_s:.2f} s an epoch, {timing.rest_s:.2f} s for the rest of a task")
    expected = forecast(sweep, first, timing, at_a_time)
    gpus = f" and {expected.gpu_hours:.2f} GPU-hours" if sweep.resources.gpus else ""
    say(
        f"estimate: {expected.trial_s:.0f} s a trial; {sweep.trials} trials, none stopped early: "
        f"{expected.hours:.2f} hours{gpus}"
    )
    if cost := expected_cost(expected, sweep.trials, prices):
        say(f"estimate: a cost of {cost:.2f}, without machines that idle")
    return expected


def check_gpu_node(options: dict[str, float], device: Device, say: Callable[[str], None]) -> None:
    """Check what a trial's first task does not show, on a node that has room for a worker with these options.

    Raises:
        ConfigError: The first check that failed, and the node.
    """
    node, outcomes = ray.get(ray.remote(_check_this_node).options(**options).remote(device))
    for outcome in outcomes:
        if outcome.verdict is Verdict.FAILED:
            raise ConfigError(f"GPU check {outcome.name!r} failed on node {node}: {outcome.detail}")
        say(f"GPU of node {node}: {outcome.name} {outcome.verdict}: {outcome.detail}")


def _check_this_node(device: Device) -> tuple[str, list[Outcome]]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        checks = {name: CHECKS[name] for name in BEYOND_A_TRIAL}
        return ray.util.get_node_ip_address(), list(run_checks(checks, device, Path(folder)))


def time_one_task(config: RunConfig, threads: int) -> Timing:
    """The first task, two epochs long."""
    torch.set_num_threads(threads)
    ends: list[float] = []
    short = override(config, {"optim.epochs": _EPOCHS, "optim.first_task": {}})
    result = next(run(short, on_epoch=lambda _: ends.append(time.perf_counter())))
    epoch_s = ends[-1] - ends[-2]
    return Timing(epoch_s, max(0.0, result.seconds - _EPOCHS * epoch_s))


def _time_here(config: RunConfig, threads: int) -> tuple[Timing, str]:
    """A task's times, and the ID of the node that they are of."""
    return time_one_task(config, threads), ray.get_runtime_context().get_node_id()


def expected_cost(expected: Forecast, trials: int, prices: Rate) -> float:
    """The cost of all trials, and of the machines beside them for as long."""
    return trials * expected.trial_s / 3600 * prices.trial + expected.hours * prices.others


def forecast(sweep: Sweep, config: RunConfig, timing: Timing, at_a_time: int) -> Forecast:
    """All trials like ``config``, ``at_a_time`` of them side by side."""
    tasks = sweep.tasks_learnt or config.data.task_count
    epochs = sum(config.optim.of_task(index).epochs for index in range(tasks))
    trial_s = epochs * timing.epoch_s + tasks * timing.rest_s
    rounds = -(-sweep.trials // at_a_time)
    return Forecast(trial_s, rounds * trial_s / 3600, sweep.trials * trial_s * sweep.resources.gpus / 3600)
