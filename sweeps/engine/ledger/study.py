"""A sweep's study as its database has it: one Optuna study.

A study may come from elsewhere, or from a disk that lost some bytes. What it says is checked when it is read: values
that no search reads back carry a checksum, and what follows from others must follow from them.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from pydantic import ValidationError
from sqlalchemy import text
from sqlalchemy.pool import StaticPool

from inflora.config import ConfigError, explain
from inflora.errors import one_line
from sweeps.engine.ledger.consistency import check_consistency
from sweeps.engine.ledger.database import file_of, storage_to_read, storage_to_write, study_url
from sweeps.engine.ledger.records import Outcome
from sweeps.engine.ledger.snapshot import snapshot
from sweeps.engine.ledger.trials import hours_so_far, read_records
from sweeps.engine.space import budget
from sweeps.engine.space.spec import Sweep


def load_study(sweep: Sweep, folder: Path) -> optuna.Study:
    """A sweep's study as it is now, to read it: of a file a copy, nothing is written.

    Raises:
        ConfigError: It is not there, damaged, or not a study of this version's.
    """
    url = study_url(folder)
    _, study = _open(sweep, url)
    if study is None:
        where = file_of(url) or url
        raise ConfigError(f"{where} has no study {sweep.study_name}: it was begun by a version with other settings")
    return study


def follow_study(sweep: Sweep, folder: Path) -> optuna.Study:
    """A sweep's study as its driver writes it, to read it again and again."""
    return optuna.load_study(study_name=sweep.study_name, storage=storage_to_write(study_url(folder)))


def check_study(sweep: Sweep, url: str) -> optuna.Study | None:
    """The study at ``url``, as ``load_study``, that the sweep can go on with; None where it can begin one.

    A study that its driver had only begun to make is one to begin.

    Raises:
        ConfigError: It is damaged, or a file of another sweep's.
    """
    file = file_of(url)
    if file is not None and not file.exists():
        return None
    names, study = _open(sweep, url)
    others = names - {sweep.study_name}
    if file is not None and others:  # a server has the studies of many
        raise ConfigError(
            f"{file} holds {one_line(', '.join(sorted(others)), 300)}, not {sweep.study_name}: a sweep with other "
            "settings, or begun by another version; choose another --storage, or remove the folder"
        )
    return study


def is_over(sweep: Sweep, url: str, stored_bytes: int) -> bool:
    """True if the study at ``url`` says that no trial is left to run, its trials storing ``stored_bytes`` now."""
    study = check_study(sweep, url)
    if study is None:
        return False
    records = read_records(study)
    ended = sum(record.outcome is not Outcome.RUNNING for record in records)
    return ended >= sweep.trials or bool(budget.why_over(sweep, records, hours_so_far(study), stored_bytes))


def _open(sweep: Sweep, url: str) -> tuple[set[str], optuna.Study | None]:
    """The names of the studies in a database, and the sweep's, if it is among them; of a file a copy is read."""
    file = file_of(url)
    with _readable(str(file or url)):
        storage = _copy_of(file) if file is not None else storage_to_read(url)
        if storage is None:
            return set(), None
        if (schema := storage.get_current_version()) != _known_schema():
            raise ValueError(f"its schema is Optuna's {schema}, the installed one's is {_known_schema()}")
        names = {str(name) for name in optuna.get_all_study_names(storage)}
        if sweep.study_name not in names:
            return names, None
        if not _are_numbered(storage, sweep.study_name):
            raise ValueError("its trials are not numbered one after another")
        study = optuna.load_study(study_name=sweep.study_name, storage=storage)
        check_consistency(sweep, study)
        return names, study


def _copy_of(file: Path) -> optuna.storages.RDBStorage:
    memory = snapshot(file)
    in_memory: dict[str, Any] = {"creator": lambda: memory, "poolclass": StaticPool}
    return optuna.storages.RDBStorage("sqlite://", in_memory, skip_compatibility_check=True)


def _are_numbered(storage: optuna.storages.RDBStorage, study_name: str) -> bool:
    """Of trials of the same number Optuna shows one."""
    of_study = "SELECT study_id FROM studies WHERE study_name = :name"
    trials = text(f"SELECT number FROM trials WHERE study_id = ({of_study}) ORDER BY trial_id")
    with storage.engine.connect() as database:
        numbers = [number for (number,) in database.execute(trials, {"name": study_name})]
    return numbers == list(range(len(numbers)))


@cache
def _known_schema() -> str:
    """The installed Optuna's; it reads all its migrations to tell."""
    return optuna.storages.RDBStorage("sqlite://").get_head_version()


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """Say in one line why a study cannot be read: its bytes are foreign, and whatever reads them may raise anything."""
    try:
        with warnings.catch_warnings(action="ignore"):  # what they warn of is refused, or was when it was written
            yield
    except ConfigError:
        raise
    except Exception as error:
        reason = explain(error) if isinstance(error, ValidationError) else str(error) or type(error).__name__
        raise ConfigError(f"cannot read the study {where}: {one_line(reason, 200)}") from None


def pareto_front(study: optuna.Study) -> set[int]:
    """The numbers of the finished trials that no other beats in all objectives and that keep the constraints."""
    return {trial.number for trial in study.best_trials}
