"""A sweep's study on disk: one Optuna study in a database file, and what it tells of every trial.

A study may come from elsewhere, or from a disk that lost some bytes. What it says is checked when it is read: values
that no search reads back carry a checksum, and what follows from others must follow from them.
"""

import json
import math
import sqlite3
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FixedTrial, FrozenTrial, TrialState
from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy import event
from sqlalchemy.pool import StaticPool

from inflora.config import ConfigError, explain
from inflora.errors import one_line
from sweeps.engine import budget, space
from sweeps.engine.metrics import Metric, direction, measure
from sweeps.engine.records import Outcome, TaskReport, TrialRecord
from sweeps.engine.snapshot import snapshot
from sweeps.engine.spec import Sweep

STUDY_FILE = "study.db"
"""The study, in the sweep's folder."""

STATES = {
    Outcome.FINISHED: TrialState.COMPLETE,
    Outcome.PRUNED: TrialState.PRUNED,
    Outcome.FAILED: TrialState.FAIL,
}
_OUTCOMES = {state: outcome for outcome, state in STATES.items()} | {TrialState.RUNNING: Outcome.RUNNING}


class _Told(BaseModel):
    """What a trial's attributes say, besides a report per task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: dict[str, space.Scalar] = {}
    same_as: int | None = None
    failures: tuple[str, ...] = ()
    again: str = ""
    reason: str = ""


def seal(value: Any) -> dict[str, Any]:
    """A value as it is kept in the study, with a checksum."""
    return {"value": value, "crc32": _checksum(value)}


def unseal(kept: Any) -> Any:
    """What was sealed; studies begun before there were checksums hold the value itself.

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
        record = self._ended.get(trial.number) or _record(trial)
        if record.outcome is not Outcome.RUNNING:
            self._ended[trial.number] = record
        return record


def load_study(sweep: Sweep, folder: Path) -> optuna.Study:
    """A sweep's study as it is now, to read it: a copy, the file is left alone.

    Raises:
        ConfigError: It is not there, damaged, or not a study of this version's.
    """
    _, study = _open(sweep, folder / STUDY_FILE)
    if study is None:
        raise ConfigError(
            f"{folder / STUDY_FILE} has no study {sweep.study_name}: it was begun by a version with other settings"
        )
    return study


def follow_study(sweep: Sweep, folder: Path) -> optuna.Study:
    """A sweep's study as its driver writes it, to read it again and again."""
    return optuna.load_study(study_name=sweep.study_name, storage=open_storage(folder))


def check_study(sweep: Sweep, folder: Path) -> optuna.Study | None:
    """The study in ``folder``, as ``load_study``, that the sweep can go on with; None where it can begin one.

    A study that its driver had only begun to make is one to begin.

    Raises:
        ConfigError: It is damaged, or another sweep's.
    """
    file = folder / STUDY_FILE
    if not file.exists():
        return None
    names, study = _open(sweep, file)
    if others := names - {sweep.study_name}:
        raise ConfigError(
            f"{file} holds {one_line(', '.join(sorted(others)), 300)}, not {sweep.study_name}: a sweep with other "
            "settings, or begun by another version; choose another --storage, or remove the folder"
        )
    return study


def is_over(sweep: Sweep, folder: Path) -> bool:
    """Whether the study in ``folder``, if there is one, says that no trial is left to run."""
    study = check_study(sweep, folder)
    if study is None:
        return False
    records = read_records(study)
    ended = sum(record.outcome is not Outcome.RUNNING for record in records)
    return ended >= sweep.trials or bool(budget.why_over(sweep, records, hours_so_far(study)))


def _open(sweep: Sweep, file: Path) -> tuple[set[str], optuna.Study | None]:
    """The names of the studies in a copy of a database, and the sweep's, if it is among them."""
    with _readable(file):
        memory = snapshot(file)
        in_memory: dict[str, Any] = {"creator": lambda: memory, "poolclass": StaticPool}
        storage = optuna.storages.RDBStorage("sqlite://", in_memory, skip_compatibility_check=True)
        if (schema := storage.get_current_version()) != _known_schema():
            raise ValueError(f"its schema is Optuna's {schema}, the installed one's is {_known_schema()}")
        names = {str(name) for name in optuna.get_all_study_names(storage)}
        if sweep.study_name not in names:
            return names, None
        if not _are_numbered(memory, sweep.study_name):
            raise ValueError("its trials are not numbered one after another")
        study = optuna.load_study(study_name=sweep.study_name, storage=storage)
        _check(sweep, study)
        return names, study


def _are_numbered(database: sqlite3.Connection, study_name: str) -> bool:
    """Of trials of the same number Optuna shows one."""
    of_study = "SELECT study_id FROM studies WHERE study_name = ?"
    trials = f"SELECT number FROM trials WHERE study_id = ({of_study}) ORDER BY trial_id"
    numbers = [number for (number,) in database.execute(trials, (study_name,))]
    return numbers == list(range(len(numbers)))


@cache
def _known_schema() -> str:
    """The installed Optuna's; it reads all its migrations to tell."""
    return optuna.storages.RDBStorage("sqlite://").get_head_version()


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Say in one line why a study cannot be read: its bytes are foreign, and whatever reads them may raise anything."""
    try:
        with warnings.catch_warnings(action="ignore"):  # what they warn of is refused, or was when it was written
            yield
    except ConfigError:
        raise
    except Exception as error:
        reason = explain(error) if isinstance(error, ValidationError) else str(error) or type(error).__name__
        raise ConfigError(f"cannot read the study {file}: {one_line(reason, 200)}") from None


def study_url(folder: Path) -> str:
    """Where a sweep's study is: one database file in its folder, written by the driver alone."""
    return f"sqlite:///{(folder / STUDY_FILE).absolute()}"


def open_storage(folder: Path) -> optuna.storages.BaseStorage:
    """The study's database, to write to it or to follow it.

    A write waits for the disk only now and then: a process that dies loses nothing, a machine that loses power at most
    the last reports, which trials send again when they go on from their checkpoints.
    """
    storage = optuna.storages.RDBStorage(study_url(folder))
    event.listen(storage.engine, "connect", _write_ahead)
    storage.engine.dispose()  # connections made before know nothing of it
    return storage


def _write_ahead(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def read_records(study: optuna.Study) -> list[TrialRecord]:
    """All trials of a study, as ``Reader.records``."""
    return Reader(study).records()


def hours_so_far(study: optuna.Study) -> float:
    """How long the sweep had run, over all its starts, when a trial last ended."""
    return float(unseal(study.user_attrs.get("hours", 0.0)))


def pareto_front(study: optuna.Study) -> set[int]:
    """The numbers of the finished trials that no other beats in all objectives and that keep the constraints."""
    return {trial.number for trial in study.best_trials}


def judged_by(sweep: Sweep) -> list[Metric]:
    """Objectives and what is constrained, each once, in order."""
    return list(dict.fromkeys((*sweep.objectives, *(constraint.metric for constraint in sweep.constraints))))


def _record(trial: FrozenTrial) -> TrialRecord:
    """What a trial's attributes say.

    Raises:
        ValueError: They are not what a ledger writes.
    """
    kept = {name: unseal(value) for name, value in trial.user_attrs.items()}
    by_task = {name: TaskReport.model_validate(kept.pop(name)) for name in list(kept) if name.startswith("task:")}
    if strange := [name for name, report in by_task.items() if name != f"task:{report.tasks_done}"]:
        raise ValueError(f"trial {trial.number} has the report of another task as {strange[0]}")
    reports = sorted(by_task.values(), key=lambda report: report.tasks_done)
    told = _Told.model_validate(kept)
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
        failures=told.failures,
        again=told.again,
    )


def _milliseconds(moment: Any) -> int | None:
    return None if moment is None else int(moment.timestamp() * 1000)


def _check(sweep: Sweep, study: optuna.Study) -> None:
    """Raise ValueError unless a study is one that the sweep's ledger could have written."""
    if [each.name.lower() for each in study.directions] != [direction(metric) for metric in sweep.objectives]:
        raise ValueError(f"it looks for another direction of {', '.join(sweep.objectives)}")
    if not (math.isfinite(hours_so_far(study)) and hours_so_far(study) >= 0):
        raise ValueError(f"its hours are {hours_so_far(study)}")
    trials = study.get_trials(deepcopy=False)
    by_number = {trial.number: trial for trial in trials}
    for record in read_records(study):
        _check_settings(sweep, by_number[record.number], record)
        if record.outcome is Outcome.FINISHED:
            _check_values(sweep, by_number[record.number], record)


def _check_settings(sweep: Sweep, trial: FrozenTrial, record: TrialRecord) -> None:
    """What is recorded as tried must be what the sampler had proposed; a driver may have died between the two."""
    if not record.settings and record.outcome is Outcome.RUNNING and not record.reports:
        return
    proposed = FixedTrial(trial.params)
    settings = space.suggest(sweep.space, proposed)
    if settings != record.settings or proposed.distributions != trial.distributions:
        raise ValueError(f"trial {record.number} has other settings than were proposed: {record.settings}")
    if not space.holds(sweep.space, settings):
        raise ValueError(f"trial {record.number} lies outside the space: {settings}")


def _check_values(sweep: Sweep, trial: FrozenTrial, record: TrialRecord) -> None:
    """A finished trial's objectives, and by how much it breaks bounds, must be what its reports say."""
    reports = record.reports
    if not reports or len(reports) != reports[-1].tasks:
        raise ValueError(f"trial {record.number} has finished with {len(reports)} reports, not one after every task")
    known: Mapping[Metric, float | None] = {
        metric: measure(metric, reports, sweep.resources.gpus) for metric in judged_by(sweep)
    }
    # The cost of a trial hangs on its resources, which another start may have changed.
    told = dict(zip(sweep.objectives, record.values, strict=True))
    if any(known[metric] != value for metric, value in told.items() if metric != "cost/gpu_hours"):
        raise ValueError(f"trial {record.number} has other values than it reported: {told}")
    bounds = {each.text: each for each in sweep.constraints}
    if trial.constraints.keys() != bounds.keys():
        raise ValueError(f"trial {record.number} was held to other bounds: {', '.join(trial.constraints)}")
    for text, bound in bounds.items():
        value = known[bound.metric]
        if bound.metric != "cost/gpu_hours" and (value is None or trial.constraints[text] != bound.excess(value)):
            raise ValueError(f"trial {record.number} breaks {text} by another amount than it reported")
