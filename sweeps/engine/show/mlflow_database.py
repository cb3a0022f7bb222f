"""An MLflow database in a file, made whole or not at all.

MLflow makes one in some hundred steps; of one that was stopped in them no later start can make anything.
"""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from inflora.config import ConfigError
from sweeps.engine.run.reach import sqlite_file

_ARTIFACTS = "./mlruns"
"""Where MLflow, left alone, keeps the artifacts of its experiment called Default, which nothing here uses."""

_WHOLE = 1
"""The mark on a database that was made here: the number that SQLite keeps in a file for its user."""


def make_whole(uri: str) -> None:
    """Make the database file that a tracking URI names, if there is none or one that a stop has left half-made.

    Raises:
        ConfigError: The file cannot be read or written.
    """
    named = sqlite_file(uri)
    if named is None:
        return
    file = named.resolve()  # a link stays one
    try:
        if not (file.exists() and _is_known_whole(file)):
            with _locked(file.parent), _draft_of(file) as draft:
                if not file.exists() or _is_unfinished(file, draft):
                    _remove(file)  # also a journal alone: it would be played back into the new file
                    draft.rename(file)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"cannot use the MLflow database {file}: {error}") from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the folder itself is the lock, so that none is left behind."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # NFS locks no folders; two that begin at the same moment there are on their own
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def _draft_of(file: Path) -> Iterator[Path]:
    """A new database beside ``file``, removed if it is not renamed; its name is fixed, so a kill's is removed next."""
    draft = file.with_name(f".{file.name}.new")
    _remove(draft)
    try:
        create(draft)
        yield draft
    finally:
        _remove(draft)


def create(file: Path) -> None:
    """Make a new database."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # brings torch along

    SqlAlchemyStore(f"sqlite:///{file}", _ARTIFACTS).engine.dispose()
    with closing(sqlite3.connect(file)) as database:
        database.execute(f"PRAGMA user_version = {_WHOLE}")


def _remove(database: Path) -> None:
    """Remove a database with its journals; those last, for a database without them may be torn."""
    for suffix in ("", "-journal", "-wal", "-shm"):
        database.with_name(database.name + suffix).unlink(missing_ok=True)


def _is_known_whole(file: Path) -> bool:
    with closing(sqlite3.connect(file)) as database:
        if database.execute("PRAGMA user_version").fetchone() == (_WHOLE,):
            return True
        made = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'runs'").fetchone()
        return bool(made and database.execute("SELECT 1 FROM runs LIMIT 1").fetchone())


def _is_unfinished(file: Path, whole: Path) -> bool:
    """True if a database never became what ``whole`` is, and has no row that a new one has not."""
    ours, new = _rows(file), _rows(whole)
    return _version(file) != _version(whole) and all(count <= new.get(table, 0) for table, count in ours.items())


def _rows(file: Path) -> dict[str, int]:
    """The number of rows in each table."""
    with closing(sqlite3.connect(file)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: database.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in tables}


def _version(file: Path) -> list[tuple[str]]:
    """The last step of its schema's making, which MLflow's migrations note as they go."""
    with closing(sqlite3.connect(file)) as database:
        known = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchall()
        return database.execute("SELECT version_num FROM alembic_version").fetchall() if known else []
