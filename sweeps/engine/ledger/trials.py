"""Trials as the study keeps them: a sealed attribute for everything the ledger knows, read back as a record."""

import json
import zlib
from datetime import datetime
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ConfigDict, TypeAdapter

from sweeps.engine.ledger.bill import Bill, bill_from
from sweeps.engine.ledger.failures import Tried
from sweeps.engine.ledger.records import Outcome, TaskReport, TrialRecord, Waiting
from sweeps.engine.space import domains

STATES = {
    Outcome.FINISHED: TrialState.COMPLETE,
    Outcome.PRUNED: TrialState.PRUNED,
    Outcome.FAILED: TrialState.FAIL,
}
_OUTCOMES = {state: outcome for outcome, state in STATES.items()} | {TrialState.RUNNING: Outcome.RUNNING}


_WAITING: TypeAdapter[Waiting | None] = TypeAdapter(Waiting | None)


class _Attributes(BaseModel):
    """A trial's attributes besides its report for every task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: dict[str, domains.Scalar] = {}
    same_as: int | None = None
    failures: tuple[str, ...] = ()
    """Reasons alone, as older versions kept them."""
    tries: tuple[Tried, ...] = ()
    again: str = ""
    reason: str = ""
    log: str = ""


def seal(value: Any) -> dict[str, Any]:
    """A value as it is kept in the study, with a checksum."""
    return {"value": value, "crc32": _checksum(value)}


def unseal(kept: Any) -> Any:
    """The value that was sealed; studies begun before there were checksums hold the value itself.

    Raises:
        ValueError: Not what was sealed.
    """
    if not isinstance(kept, dict) or kept.keys() != {"value", "crc32"}:
        return kept
    if kept["crc32"] != _checksum(kept["value"]):
        raise ValueError("a checksum does not fit what it was made of")
    return kept["value"]


def _checksum(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


class Reader:
    """Reads a study again and again; a trial that has ended is understood once."""

    def __init__(self, study: optuna.Study) -> None:
        self.study = study
        self._ended: dict[int, TrialRecord] = {}

    def records(self) -> list[TrialRecord]:
        """All trials, oldest first; proposals dropped for repeating another trial are not among them."""
        trials = self.study.get_trials(deepcopy=False)
        shown = (t for t in trials if "same_as" not in t.user_attrs and t.state is not TrialState.WAITING)
        return [self.record_of(trial) for trial in shown]

    def record_of(self, trial: FrozenTrial) -> TrialRecord:
        """One trial's record."""
        record = self._ended.get(trial.number) or record_of(trial)
        if record.outcome is not Outcome.RUNNING:
            self._ended[trial.number] = record
        return record


def read_records(study: optuna.Study) -> list[TrialRecord]:
    """All trials of a study, as ``Reader.records``."""
    return Reader(study).records()


def stored_bytes(study: optuna.Study) -> int:
    """The size of the trials' checkpoints when it was last measured."""
    return int(unseal(study.user_attrs.get("stored_bytes", 0)))


def key_of(study: optuna.Study) -> str:
    """What tells a study from others of the same sweep; empty where a version before 0.2 has begun it."""
    return str(unseal(study.user_attrs.get("key", "")))


def validation_images(study: optuna.Study) -> int | None:
    """The number of images that all trials are judged on; None where an older version began the study.

    Raises:
        ValueError: Not such a number.
    """
    images = unseal(study.user_attrs.get("images"))
    if images is not None and (type(images) is not int or images < 1):
        raise ValueError(f"its trials were judged on {images!r} images")
    return images


def place_of(study: optuna.Study) -> str:
    """The address of the place where the trials are kept; empty where an older version began the study."""
    return str(unseal(study.user_attrs.get("place", "")))


def waiting(study: optuna.Study) -> Waiting | None:
    """The trials that waited for room when the driver last looked; it writes what has changed.

    Raises:
        ValueError: Not what a driver writes.
    """
    return _WAITING.validate_python(unseal(study.user_attrs.get("waiting")))


def bill_so_far(study: optuna.Study) -> Bill:
    """The cost of the machines, over all starts, when the driver last wrote it.

    Raises:
        ValueError: Not what a driver writes.
    """
    return bill_from(unseal(study.user_attrs.get("bill")))


def hours_so_far(study: optuna.Study) -> float:
    """The hours that the sweep had run, over all its starts, when a trial last ended."""
    return float(unseal(study.user_attrs.get("hours", 0.0)))


def new_record(number: int, settings: dict[str, Any], start: datetime | None) -> TrialRecord:
    """The record of a trial that has just begun."""
    return TrialRecord(number, settings, Outcome.RUNNING, [], None, "", _milliseconds(start) or 0, None)


def record_of(trial: FrozenTrial) -> TrialRecord:
    """The record that a trial's attributes make.

    Raises:
        ValueError: They are not what a ledger writes.
    """
    kept = {name: unseal(value) for name, value in trial.user_attrs.items()}
    by_task = {name: TaskReport.model_validate(kept.pop(name)) for name in list(kept) if name.startswith("task:")}
    if strange := [name for name, report in by_task.items() if name != f"task:{report.tasks_done}"]:
        raise ValueError(f"trial {trial.number} has the report of another task as {strange[0]}")
    reports = sorted(by_task.values(), key=lambda report: report.tasks_done)
    told = _Attributes.model_validate(kept)
    values = tuple(trial.values) if trial.state is TrialState.COMPLETE else ()
    return TrialRecord(
        number=trial.number,
        settings=told.settings,
        outcome=_OUTCOMES[trial.state],
        reports=reports,
        value=values[0] if values else None,
        reason=told.reason,
        start_ms=_milliseconds(trial.datetime_start) or 0,
        end_ms=_milliseconds(trial.datetime_complete),
        values=values,
        broken={bound: excess for bound, excess in trial.constraints.items() if excess > 0},
        tries=told.tries or tuple(Tried(reason, 0) for reason in told.failures),
        again=told.again,
        log=told.log,
    )


def _milliseconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp() * 1000)
