"""A run on disk: its config, its state after every task, and its result."""

import os
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel

from inflora.config import ConfigError, RunConfig, dump_config
from inflora.continual import TaskResult, run
from inflora.data.stream import EvaluateOn
from inflora.data.tasks import in_numbers
from inflora.files import why_unwritable, write_atomically
from inflora.metrics import accuracy_matrix
from inflora.peft_export import save_adapter
from inflora.setup import identity
from inflora.state import RunState, has_state, load_state, of_folder, save_state
from inflora.training import EpochDone


def train_into(
    out: Path,
    config: RunConfig,
    evaluate_on: EvaluateOn,
    *,
    resume: bool = False,
    on_task: Callable[[TaskResult], None] = lambda _: None,
    on_epoch: Callable[[EpochDone], None] = lambda _: None,
) -> RunState:
    """Run ``config`` with ``config.yaml``, ``state/`` and ``result.json`` in ``out``; the state at the end.

    What each task has merged into the backbone lies in ``adapters/task-<n>`` (from 1), as PEFT loads it.

    With ``resume`` a run that was interrupted goes on after its last finished task; a complete one is left as it is.

    Raises:
        ConfigError, DataError, StateError: Before anything is trained or overwritten.
    """
    config = in_numbers(config)
    folder = out / "state"
    state = _claim(out, resume=resume)
    is_whole = state is not None and state.is_complete and all((out / name).exists() for name in _FILES)
    with of_folder(folder):
        for result in run(config, state, evaluate_on=evaluate_on, on_epoch=on_epoch):
            if result.factors:
                name = config.backbone.name
                save_adapter(out / "adapters" / f"task-{result.task + 1}", result.model.backbone, result.factors, name)
            save_state(result.state, folder)
            write_atomically(out / "config.yaml", dump_config(config).encode())
            on_task(result)
            state = result.state
    assert state is not None and state.is_complete
    if is_whole:  # with the versions that it was trained with
        return state
    write_atomically(out / "config.yaml", dump_config(config).encode())
    write_atomically(out / "result.json", result_of(config, state).model_dump_json(indent=2).encode())
    return state


def _claim(out: Path, *, resume: bool) -> RunState | None:
    """The state to go on from; refuses a folder with a run that is not to be resumed, or files in its way."""
    for folder in (out, *(out / name for name in _FOLDERS)):
        if problem := why_unwritable(folder):
            raise ConfigError(f"cannot write into {str(out)[:100]}: {problem}")
    for file in (out / name for name in _FILES):
        if os.path.lexists(file) and not file.is_file():
            raise ConfigError(f"cannot write into {out}: {file} is not a file")
    if has_state(out / "state"):
        if not resume:
            raise ConfigError(f"{out} already holds a run; choose another folder with --out, or go on with --resume")
        return load_state(out / "state")
    if foreign := [name for name in _FILES if os.path.lexists(out / name)]:
        raise ConfigError(f"{out} holds {foreign[0]} and no run; choose another folder with --out")
    return None


_FOLDERS = ("state", "adapters")
_FILES = ("config.yaml", "result.json")


class Result(BaseModel):
    """A finished run: metrics, accuracy matrix, settings and what the numbers depend on."""

    evaluated_on: str
    metrics: dict[str, float]
    accuracy_matrix: list[list[float]]
    identity: dict[str, str]
    config: RunConfig


def result_of(config: RunConfig, state: RunState) -> Result:
    """Gather what is reported of a finished run."""
    return Result(
        evaluated_on=state.evaluate_on,
        metrics=state.metrics(state.tasks_done),
        accuracy_matrix=accuracy_matrix(state.evaluations),
        identity=identity(config),
        config=config,
    )
