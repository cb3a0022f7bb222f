"""What a trial reports to Tune besides how it fails: where its log is, then each task's metrics."""

import sys
from collections.abc import Mapping
from typing import Any

import ray
from ray._private.worker import global_worker

from inflora.metrics import accuracy_row
from inflora.state import RunState
from sweeps.engine.ledger.records import TaskReport, now_ms


def begin_log(number: int, name: str) -> dict[str, Any]:
    """Begin a trial's part of this worker's log, which may tell of other trials before, and report where it is.

    It is where the worker writes its stderr, as ``address:path``; a file beside it, which ends in .out, has its stdout.
    """
    print(f"trial {number} ({name}) starts here", file=sys.stderr, flush=True)
    path = global_worker.get_err_file_path() or " (kept in no file)"
    # Tune refuses reports without its metric.
    return {"acc/seen": 0.0, "log": f"{ray.util.get_node_ip_address()}:{path}"}


def task_report(
    state: RunState, tasks_done: int, tasks: int | None, seconds: float = 0.0, more: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """The report of a task: the metrics, and all of it as one value for the ledger."""
    state = state._replace(tasks=tasks or state.tasks)
    report = TaskReport(
        tasks_done=tasks_done,
        tasks=state.tasks,
        metrics={**state.metrics(tasks_done), **(more or {})},
        accuracies=accuracy_row(state.evaluations[tasks_done - 1]),
        seconds=seconds,
        time_ms=now_ms(),
    )
    return {**report.metrics, "tasks_done": tasks_done, "report": report.model_dump_json()}
