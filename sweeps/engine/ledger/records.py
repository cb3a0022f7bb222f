"""A trial as plain values, which the ledger keeps and everyone else reads."""

import time
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from inflora.config import RunConfig, config_hash
from sweeps.engine.ledger.failures import Failure, Tried, kind_of, node_of


class TaskReport(BaseModel):
    """A trial's report after a task."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    tasks_done: int = Field(ge=1)
    tasks: int = Field(ge=1)
    metrics: dict[str, float]
    accuracies: list[float]
    seconds: float = Field(ge=0, allow_inf_nan=False)
    time_ms: int = Field(ge=0)

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.tasks_done > self.tasks:
            raise ValueError(f"at most all {self.tasks} tasks can be done, got {self.tasks_done}")
        if len(self.accuracies) != self.tasks_done:
            raise ValueError(f"accuracies must be one per task done ({self.tasks_done}), got {len(self.accuracies)}")
        if "acc/seen" not in self.metrics:
            raise ValueError("metrics must hold acc/seen")
        return self


class Outcome(StrEnum):
    """The stages of a trial."""

    RUNNING = "running"
    FINISHED = "finished"
    PRUNED = "pruned"
    FAILED = "failed"


REFUSED = "ConfigError: "
"""The beginning of the reason for which a trial has failed before it could run: rules refuse its settings."""


class BestBy(StrEnum):
    """The rules by which one trial of many is the best."""

    ESTIMATE = "estimate"  # of its score, from all finished trials
    OBSERVED = "observed"  # its own score, the luckiest of many


class TrialRecord(NamedTuple):
    """One trial as the ledger knows it.

    ``value`` is its objective, ``values`` all objectives; ``broken`` names the constraints it breaks and by how much;
    ``tries`` are those that failed, ``again`` the change with which it was last tried again; ``log`` is where its last
    worker writes what it prints (``address:path``).
    """

    number: int
    settings: dict[str, Any]
    outcome: Outcome
    reports: list[TaskReport]
    value: float | None
    reason: str
    start_ms: int
    end_ms: int | None
    values: tuple[float, ...] = ()
    broken: dict[str, float] = {}
    tries: tuple[Tried, ...] = ()
    again: str = ""
    log: str = ""

    @property
    def was_refused(self) -> bool:
        """True if the trial has failed by its settings alone, which no start of it changes."""
        return self.outcome is Outcome.FAILED and self.reason.startswith(REFUSED)

    @property
    def failed_on(self) -> set[str]:
        """The IDs of the nodes on which tries failed through no fault of the trial's."""
        return {node_id for each in self.tries if (node_id := node_of(each.reason))}


class Waiting(NamedTuple):
    """Trials that wait for room: how many, for what, since when, and why the autoscaler does not bring it."""

    trials: int
    needs: str
    since_ms: int
    problem: str = ""

    @property
    def line(self) -> str:
        """All of it, in the reader's own time."""
        who = "1 trial waits" if self.trials == 1 else f"{self.trials} trials wait"
        since = time.strftime("%b %d %H:%M", time.localtime(self.since_ms / 1000))
        return f"{who} for {self.needs}, since {since}" + (f"; {self.problem}" if self.problem else "")


def now_ms() -> int:
    """The time that reports carry."""
    return int(time.time() * 1000)


def trial_name(study_name: str, number: int, config: RunConfig) -> str:
    """The folder of a trial's state; the same name makes an interrupted trial resume.

    It holds the hash of the trial's settings: a head that has lost its study may give the number to others.
    """
    return f"{old_trial_name(study_name, number)}-{config_hash(config)[:8]}"


def old_trial_name(study_name: str, number: int) -> str:
    """The folder in which earlier versions kept a trial's state, whatever its settings were."""
    return f"{study_name}-{number:04d}"


def best_first(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """All trials as tables list them: the highest objective first, those without one last."""
    return sorted(records, key=lambda r: (r.value is None, -(r.value or 0.0), r.number))


def best_record(records: Sequence[TrialRecord]) -> TrialRecord | None:
    """The best of ``ranking``."""
    return next(iter(ranking(records)), None)


def ranking(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Finished trials that keep all constraints, the highest objective first: stopped and failed ones do not count."""
    finished = [r for r in records if r.outcome is Outcome.FINISHED and r.value is not None and not r.broken]
    return sorted(finished, key=lambda record: (-(record.value or 0.0), record.number))


def sick_nodes(records: Sequence[TrialRecord]) -> dict[str, str]:
    """The IDs of nodes on which trials failed by the nodes' own fault, and why.

    Where a trial has failed for good, on one node after another, the fault was its own.
    """
    return {
        node_id: each.reason
        for record in records
        if record.outcome is not Outcome.FAILED or len(record.failed_on) == 1
        for each in record.tries
        if kind_of(each.reason) is Failure.NODE and (node_id := node_of(each.reason))
    }


def describe(settings: dict[str, Any]) -> str:
    """Settings in a line."""
    return "  ".join(
        f"{path}={value:.4g}" if isinstance(value, float) else f"{path}={value}" for path, value in settings.items()
    )
