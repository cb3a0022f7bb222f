"""Where a trial's state is kept and who hears of its results: Ray Train, or Tune itself."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import ray.train
import ray.tune
from ray.train import Checkpoint

from inflora import distributed
from inflora.state import MANIFEST, RunState, has_state, load_state, save_state
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
        self.trials, self.name = trials, name

    def restore(self) -> RunState | None:
        return self.trials.when_there(lambda: _restore(self.trials, self.name))

    def forget(self) -> None:
        self.trials.discard(self.name)

    def report(self, metrics: dict[str, Any], state: RunState | None) -> None:
        if state is not None:
            self.trials.when_there(lambda: _keep(state, self.trials, self.name))
        ray.tune.report({**metrics, "checkpoint_path": f"{self.trials.address}/{self.name}"})


def _restore(trials: SharedFolder, name: str) -> RunState | None:
    with trials.fetched(name) as folder:
        return load_state(folder) if has_state(folder) else None


def _keep(state: RunState, trials: SharedFolder, name: str) -> None:
    """Save a state; in a bucket its files come before the manifest that names them, and old ones go after it."""
    if trials.is_local:
        save_state(state, Path(trials.address) / name)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_state(state, folder)
        there, files = trials.files(name), {file.name for file in folder.iterdir()}
        for file in sorted(files - there - {MANIFEST}):
            trials.write(f"{name}/{file}", (folder / file).read_bytes())
        trials.write(f"{name}/{MANIFEST}", (folder / MANIFEST).read_bytes())
        for file in there - files:
            trials.delete(f"{name}/{file}")
