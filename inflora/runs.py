"""A run on disk: its config, its state after every task, and its result."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from inflora.adapters import save_adapter
from inflora.config import ConfigError, RunConfig, dump_config
from inflora.continual import TaskResult, identity, run
from inflora.data.stream import EvaluateOn
from inflora.metrics import accuracy_matrix
from inflora.state import RunState, has_state, load_state, save_state, write_atomically
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
    folder = out / "state"
    state = _claim(out, resume=resume)
    for result in run(config, state, evaluate_on=evaluate_on, on_epoch=on_epoch):
        if result.factors:
            name = config.backbone.name
            save_adapter(out / "adapters" / f"task-{result.task + 1}", result.model.backbone, result.factors, name)
        save_state(result.state, folder)
        write_atomically(out / "config.yaml", dump_config(config).encode())
        on_task(result)
        state = result.state
    assert state is not None and state.is_complete
    write_atomically(out / "config.yaml", dump_config(config).encode())
    write_atomically(out / "result.json", json.dumps(summary(config, state), indent=2).encode())
    return state


def _claim(out: Path, *, resume: bool) -> RunState | None:
    """The state to go on from; refuses a folder with a run that is not to be resumed, or with somebody else's files."""
    folder = out / "state"
    if has_state(folder):
        if not resume:
            raise ConfigError(f"{out} already holds a run; go on with --resume or choose another --out")
        return load_state(folder)
    for name in ("config.yaml", "result.json"):
        if (out / name).exists():
            raise ConfigError(f"{out / name} exists and is of no run that could be resumed; choose another --out")
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"cannot write into {out}: {there} is not a folder that may be written to")
    return None


def summary(config: RunConfig, state: RunState) -> dict[str, object]:
    """A finished run as plain values: metrics, accuracy matrix, settings and what the numbers depend on."""
    return {
        "evaluated_on": state.evaluate_on,
        "metrics": state.metrics(state.tasks_done),
        "accuracy_matrix": accuracy_matrix(state.evaluations),
        "identity": identity(config),
        "config": config.model_dump(mode="json"),
    }
