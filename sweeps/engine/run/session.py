"""Where a trial's state is kept and who hears of its results: Ray Train, or Tune itself."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import ray.train
import ray.tune
from ray.train import Checkpoint

from inflora import distributed
from inflora.state import RunState, has_state, load_state, save_state
from inflora.storage import SharedFolder


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
