"""One trial: the worker that learns the tasks.

In a worker of Ray Train (``train_worker``) or inside the Tune trial itself (``inline_trial``), the same ``learn`` runs:
what differs is the ``Session``, where a state comes from and where results go.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import ray.train.torch
import ray.tune
import torch
from ray.train import Checkpoint

from inflora import distributed
from inflora.config import RunConfig, parse_config
from inflora.continual import run
from inflora.cuda import require_cuda
from inflora.errors import one_line
from inflora.integrity import check_state
from inflora.metrics import accuracy_row
from inflora.state import RunState, StateError, has_state, load_state, save_state
from inflora.storage import SharedFolder
from sweeps.engine.ledger.failures import NodeFault
from sweeps.engine.ledger.records import TaskReport, now_ms
from sweeps.engine.run.nodes import Likeness, faults_named, require_like_driver
from sweeps.engine.space.spec import Resources


class Session(Protocol):
    """Where a trial's state is kept and who hears of its results."""

    def restore(self) -> RunState | None:
        """The state after the last finished task, if the trial was interrupted.

        Raises:
            StateError, OSError: What was kept of it is damaged.
        """

    def forget(self) -> None:
        """Make room for a trial that begins again."""

    def report(self, metrics: dict[str, Any], state: RunState | None) -> None:
        """Keep ``state`` and pass ``metrics`` on."""


def run_trial(settings: dict[str, Any], session: Session) -> None:
    """Learn, on a machine that must be as the driver's is; what is wrong with it is reported as its own fault."""
    try:
        with faults_named():
            require_like_driver(Likeness(**settings["likeness"]))
            require_gpus_given(settings)
            learn(settings, session)
    except NodeFault as fault:
        if distributed.world_size() > 1:
            raise  # the other workers wait for this one: only Train can end them all
        session.report({"acc/seen": 0.0, "failure": f"{type(fault).__name__} {fault}"}, None)


def require_gpus_given(settings: dict[str, Any]) -> None:
    """Raise ConfigError where a trial has been given GPUs, may train on them, and PyTorch finds none."""
    if settings["gpus"] and settings["config"]["device"] != "cpu":
        require_cuda()


def learn(settings: dict[str, Any], session: Session) -> None:
    """Learn the stream, or its first ``tasks`` tasks, on train and validation images: a report per task.

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
            session.report(_metrics(state, tasks_done, tasks), state)
    left = None if tasks is None else tasks - (state.tasks_done if state else 0)
    try:
        for result in islice(run(config, state), left):
            session.report(_metrics(result.state, result.state.tasks_done, tasks, result.seconds), result.state)
    except (FloatingPointError, torch.cuda.OutOfMemoryError, MemoryError) as error:
        if distributed.world_size() > 1:
            raise  # the other workers wait for this one: only Train can end them all
        session.report({"acc/seen": 0.0, "failure": f"{type(error).__name__}: {error}"}, None)


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


def _metrics(state: RunState, tasks_done: int, tasks: int | None, seconds: float = 0.0) -> dict[str, Any]:
    """A task's report to Tune: the metrics, and all of it as one value for the ledger."""
    state = state._replace(tasks=tasks or state.tasks)
    report = TaskReport(
        tasks_done=tasks_done,
        tasks=state.tasks,
        metrics=state.metrics(tasks_done),
        accuracies=accuracy_row(state.evaluations[tasks_done - 1]),
        seconds=seconds,
        time_ms=now_ms(),
    )
    return {**report.metrics, "tasks_done": tasks_done, "report": report.model_dump_json()}


class TrainSession:
    """Inside a Ray Train worker: Train keeps the checkpoints, rank 0 writes them."""

    def __init__(self, trials: SharedFolder) -> None:
        self.trials = trials

    def restore(self) -> RunState | None:
        checkpoint = ray.train.get_checkpoint()
        return None if checkpoint is None else self.trials.when_there(lambda: _load(checkpoint))

    def forget(self) -> None:
        """Nothing: Train gives every checkpoint a folder of its own."""

    def report(self, metrics: dict[str, Any], state: RunState | None) -> None:
        with _checkpoint(state if distributed.rank() == 0 else None) as checkpoint:
            ray.train.report(metrics, checkpoint=checkpoint, checkpoint_upload_fn=self._upload)

    def _upload(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        """Upload as Train does, but wait for a place that is away: Train would end the worker."""
        upload = ray.train.get_context().get_storage().persist_current_checkpoint
        return self.trials.when_there(lambda: upload(checkpoint, name))


def _load(checkpoint: Checkpoint) -> RunState:
    with checkpoint.as_directory() as folder:
        return load_state(Path(folder))


@contextmanager
def _checkpoint(state: RunState | None) -> Iterator[Checkpoint | None]:
    if state is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        save_state(state, Path(folder))
        yield Checkpoint.from_directory(folder)


class InlineSession:
    """Inside a Tune trial, with one worker: the state is kept in a folder of the trial's own among all trials'."""

    def __init__(self, trials: SharedFolder, name: str) -> None:
        self.trials, self.folder = trials, Path(trials.address) / name

    def restore(self) -> RunState | None:
        return self.trials.when_there(lambda: load_state(self.folder) if has_state(self.folder) else None)

    def forget(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def report(self, metrics: dict[str, Any], state: RunState | None) -> None:
        if state is not None:
            self.trials.when_there(lambda: save_state(state, self.folder))
        ray.tune.report({**metrics, "checkpoint_path": str(self.folder)})


def inline_trial(resources: Resources, trials: str) -> Callable[[dict[str, Any]], None]:
    """The trainable that learns inside the Tune trial: no processes of its own, so a trial starts at once."""

    def trial(settings: dict[str, Any]) -> None:
        torch.set_num_threads(resources.cpus_per_worker)
        run_trial(settings, InlineSession(SharedFolder(trials), settings["name"]))

    return trial


def train_worker(settings: dict[str, Any]) -> None:
    """Run a trial in a worker of Ray Train."""
    torch.set_num_threads(settings["threads"])
    if torch.cuda.is_available():
        # Train shows all of a node's GPUs to each of its workers; "cuda" must mean this worker's own.
        torch.cuda.set_device(ray.train.torch.get_device())
    run_trial(settings, TrainSession(SharedFolder(settings["trials"])))
