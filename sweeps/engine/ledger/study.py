"""A sweep's study on disk: one Optuna study in a database file.

A study may come from elsewhere, or from a disk that lost some bytes. What it says is checked when it is read: values
that no search reads back carry a checksum, and what follows from others must follow from them.
"""

import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from pydantic import ValidationError
from sqlalchemy import event
from sqlalchemy.pool import StaticPool

from inflora.config import ConfigError, explain
from inflora.errors import one_line
from sweeps.engine.ledger.consistency import check_consistency
from sweeps.engine.ledger.records import Outcome
from sweeps.engine.ledger.snapshot import snapshot
from sweeps.engine.ledger.trials import hours_so_far, read_records
from sweeps.engine.space import budget
from sweeps.engine.space.spec import Sweep

STUDY_FILE = "study.db"
"""The study, in the sweep's folder."""


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


def is_over(sweep: Sweep, folder: Path, stored_bytes: int) -> bool:
    """True if the study in ``folder`` says that no trial is left to run, its trials storing ``stored_bytes`` now."""
    study = check_study(sweep, folder)
    if study is None:
        return False
    records = read_records(study)
    ended = sum(record.outcome is not Outcome.RUNNING for record in records)
    return ended >= sweep.trials or bool(budget.why_over(sweep, records, hours_so_far(study), stored_bytes))


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
        check_consistency(sweep, study)
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
    _make_whole(folder / STUDY_FILE)
    storage = optuna.storages.RDBStorage(study_url(folder))
    event.listen(storage.engine, "connect", _write_ahead)
    storage.engine.dispose()  # connections made before know nothing of it
    return storage


def _make_whole(file: Path) -> None:
    """Make the database, if there is none, beside its place, and move it there: Optuna makes it in many steps.

    Of one that was stopped between a table and its index, a later start makes no index, and then a second study.
    """
    if file.exists():
        return
    draft = file.with_name(f".{file.name}.new")  # a fixed name: what a kill has left is removed here
    for suffix in ("", "-journal"):
        draft.with_name(draft.name + suffix).unlink(missing_ok=True)
    optuna.storages.RDBStorage(f"sqlite:///{draft.absolute()}").engine.dispose()
    draft.rename(file)


def _write_ahead(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def pareto_front(study: optuna.Study) -> set[int]:
    """The numbers of the finished trials that no other beats in all objectives and that keep the constraints."""
    return {trial.number for trial in study.best_trials}
