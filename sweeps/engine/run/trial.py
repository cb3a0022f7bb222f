"""One trial: the worker that learns the tasks.

In a worker of Ray Train (``train_worker``) or inside the Tune trial itself (``inline_trial``), the same ``learn`` runs:
what differs is the ``Session``, where a state comes from and where results go.
"""

import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import ray.train.torch
import torch

from inflora import distributed
from inflora.config import RunConfig, parse_config
from inflora.continual import run
from inflora.cuda import pick_device, require_cuda
from inflora.errors import one_line
from inflora.integrity import check_state
from inflora.state import RunState, StateError
from inflora.storage import SharedFolder
from inflora.training import EpochDone
from sweeps.engine.ledger.failures import NodeFault
from sweeps.engine.run.gpu_use import Gpu, GpuMeter, gpu_of
from sweeps.engine.run.nodes import Likeness, faults_named, require_like_driver
from sweeps.engine.run.reports import begin_log, task_report
from sweeps.engine.run.session import InlineSession, Session, TrainSession
from sweeps.engine.space.spec import Resources

ALIVE_EVERY_S = 60.0
"""The least time between two signs of life: each is a report, which the driver must take."""


def run_trial(settings: dict[str, Any], session: Session) -> None:
    """Learn, on a machine that must be as the driver's is; what is wrong with it is reported as its own fault."""
    session.report(begin_log(settings["number"], settings["name"]), None)
    try:
        with faults_named():
            require_like_driver(Likeness(**settings["likeness"]))
            if settings["gpus"] and settings["config"]["device"] != "cpu":
                require_cuda()
            learn(settings, session, gpu_of(pick_device(settings["config"]["device"])))
    except NodeFault as fault:
        if distributed.world_size() > 1:
            raise  # the other workers wait for this one: only Train can end them all
        session.report({"acc/seen": 0.0, "failure": f"{type(fault).__name__} {fault}"}, None)


def learn(settings: dict[str, Any], session: Session, gpu: Gpu | None = None) -> None:
    """Learn the stream, or its first ``tasks`` tasks, on train and validation images: a report per task.

    With a ``gpu`` each report of a task that was learnt here tells how much of it was used.

    A trial that went on after the ledger last heard of it reports those tasks first. One whose state is damaged begins
    again, and says so. What no retry can help (a loss that is not a number, no memory left) is reported as the trial's
    failure.
    """
    config, tasks = parse_config(settings["config"]), settings["tasks"]
    state, damage = restored(session, config)
    if notice := damage or settings.get("notice", ""):
        session.report({"acc/seen": 0.0, "notice": notice}, None)  # Tune refuses reports without its metric
    if state is not None:
        for tasks_done in range(settings["tasks_done"] + 1, state.tasks_done + 1):
            session.report(task_report(state, tasks_done, tasks), state)
    left = None if tasks is None else tasks - (state.tasks_done if state else 0)
    try:
        with GpuMeter(gpu) as meter:
            for result in islice(run(config, state, on_epoch=signs_of_life(session)), left):
                told = task_report(result.state, result.state.tasks_done, tasks, result.seconds, meter.take())
                session.report(told, result.state)
    except (FloatingPointError, torch.cuda.OutOfMemoryError, MemoryError) as error:
        if distributed.world_size() > 1:
            raise  # the other workers wait for this one: only Train can end them all
        session.report({"acc/seen": 0.0, "failure": f"{type(error).__name__}: {error}"}, None)


def signs_of_life(session: Session) -> Callable[[EpochDone], None]:
    """What reports after an epoch that the trial lives: a task may take hours, in which nothing else is heard of it."""
    last = time.monotonic()

    def tell(_: EpochDone) -> None:
        nonlocal last
        # All workers or none: Train waits for a report of each, and their clocks differ.
        if distributed.all_true(time.monotonic() - last >= ALIVE_EVERY_S):
            session.report({"acc/seen": 0.0}, None)
            last = time.monotonic()

    return tell


def restored(session: Session, config: RunConfig) -> tuple[RunState | None, str]:
    """The state to go on from; None where the trial begins, with what is damaged where it has to begin again.

    All workers go on from it, or none does.
    """
    state, damage = None, ""
    try:
        state = session.restore()
        if state is not None:
            check_state(config, state)
    except StateError as error:  # what cannot be reached now is no damage: that is tried again
        damage = one_line(str(error), 300)
    if distributed.all_true(not damage):
        return state, ""
    session.forget()
    return None, damage or "another worker cannot read its state"


def inline_trial(resources: Resources, trials: str) -> Callable[[dict[str, Any]], None]:
    """The trainable that learns inside the Tune trial: no processes of its own, so a trial starts at once."""

    def trial(settings: dict[str, Any]) -> None:
        torch.set_num_threads(resources.cpus_per_worker)
        run_trial(settings, InlineSession(SharedFolder(trials), settings["name"]))

    return trial


def train_worker(settings: dict[str, Any]) -> None:
    """Run a trial in a worker of Ray Train."""
    torch.set_num_threads(settings["threads"])
    if settings["config"]["device"] != "cpu" and torch.cuda.is_available():
        # Train shows all of a node's GPUs to each of its workers; "cuda" must mean this worker's own.
        torch.cuda.set_device(ray.train.torch.get_device())
    run_trial(settings, TrainSession(SharedFolder(settings["trials"])))
