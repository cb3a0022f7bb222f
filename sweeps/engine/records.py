"""What is known of a trial: plain values that the ledger keeps and everyone else reads."""

import time
from enum import StrEnum
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict


class TaskReport(BaseModel):
    """What a trial reports when it has learnt a task."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    tasks_done: int
    tasks: int
    metrics: dict[str, float]
    accuracies: list[float]
    seconds: float
    time_ms: int


class Outcome(StrEnum):
    """How a trial stands."""

    RUNNING = "running"
    FINISHED = "finished"
    PRUNED = "pruned"
    FAILED = "failed"


class TrialRecord(NamedTuple):
    """One trial as the ledger knows it."""

    number: int
    settings: dict[str, Any]
    outcome: Outcome
    reports: list[TaskReport]
    value: float | None
    reason: str
    start_ms: int
    end_ms: int | None


def now_ms() -> int:
    """The time that reports carry."""
    return int(time.time() * 1000)


def best_record(records: list[TrialRecord]) -> TrialRecord | None:
    """The finished trial with the highest objective: stopped and failed trials do not count."""
    finished = [(r.value, -r.number, r) for r in records if r.outcome is Outcome.FINISHED and r.value is not None]
    return max(finished)[2] if finished else None
