"""The database of a sweep's study: a file in its folder, or one of a PostgreSQL server's, which its folder names.

A file is on the driver's own disk and goes with its machine; the shared place has a copy as of a trial's last end. On a
server the study outlives the driver's machine whole, and whoever drives the sweep next goes on with the last report.
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from sqlalchemy import URL, create_engine, event, inspect, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import NullPool

from inflora.config import ConfigError
from inflora.errors import one_line, without_password
from inflora.files import write_atomically
from inflora.patience import patiently

logger = logging.getLogger(__name__)

STUDY_FILE = "study.db"
"""The study, in the sweep's folder, if it is a file."""

URL_FILE = "study.url"
"""The address of the study, in the sweep's folder, if it is on a server."""

PATIENCE_S = 900.0
"""The time for which a server may be away before its driver gives up."""

_CONNECT_S = 10


def study_url(folder: Path) -> str:
    """The address of the study of the sweep in ``folder``; of its file if none has been begun.

    Raises:
        ConfigError: The folder names something else than a database on a server.
    """
    named = folder / URL_FILE
    return checked_url(named.read_text().strip()) if named.exists() else f"sqlite:///{(folder / STUDY_FILE).absolute()}"


def chosen_url(folder: Path, given: str | None) -> str:
    """The address of the study of the sweep in ``folder``, which is ``given`` when it begins.

    Raises:
        ConfigError: Not an address, or the sweep has begun with another.
    """
    known = study_url(folder)
    if given is None or checked_url(given) == known:
        return known
    if (folder / URL_FILE).exists() or (folder / STUDY_FILE).exists():
        raise ConfigError(f"the study of the sweep in {folder} is {known}: it cannot go on in {given}")
    return given


def checked_url(text: str) -> str:
    """The address of a database on a server.

    Raises:
        ConfigError: It is of another kind, or has a password, which would lie in files and logs.
    """
    shape, shown = "--study is postgresql://user@host/database", one_line(without_password(text), 200)
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):  # ValueError: of a port that is no number
        raise ConfigError(f"{shape}, got {shown!r}") from None
    if url.password or any("password" in name for name in url.query):
        raise ConfigError(f"{shape} without a password: PGPASSWORD or ~/.pgpass has it")
    if url.get_backend_name() != "postgresql" or not url.database:
        raise ConfigError(f"{shape}, got {shown!r}")
    return text


def file_of(url: str) -> Path | None:
    """The study's file; None of one on a server."""
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None


def keep_url(folder: Path, url: str) -> None:
    """Leave the address of a study on a server in the sweep's folder, for whoever comes with the folder alone."""
    if file_of(url) is None and not (folder / URL_FILE).exists():
        write_atomically(folder / URL_FILE, f"{url}\n".encode())


def storage_to_write(url: str) -> optuna.storages.RDBStorage:
    """The study's database, to write to it or to follow it.

    A file's write waits for the disk only now and then: a process that dies loses nothing, a machine that loses power
    at most the last reports, which trials send again when they go on from their checkpoints, and ends, which the copy
    in the shared place has. For a server that is away it is waited; what it was in the middle of is raised, and the
    study then is as before or as after.
    """
    file = file_of(url)
    if file is not None:
        _make_whole(file)
        storage = optuna.storages.RDBStorage(url)
        event.listen(storage.engine, "connect", _write_ahead)
    else:
        options = {"pool_pre_ping": True, "connect_args": {"connect_timeout": _CONNECT_S}}
        storage = optuna.storages.RDBStorage(with_driver(url), options)
        event.listen(storage.engine, "do_connect", partial(_connect_patiently, storage.engine.url))
    storage.engine.dispose()  # connections made before know nothing of it
    return storage


def storage_to_read(url: str) -> optuna.storages.RDBStorage | None:
    """The database on a server as it is; None where it has no tables of Optuna's, which are then not made."""
    url, options = with_driver(url), {"poolclass": NullPool, "connect_args": {"connect_timeout": _CONNECT_S}}
    if not inspect(create_engine(url, **options)).has_table("version_info"):
        return None
    return optuna.storages.RDBStorage(url, options, skip_compatibility_check=True, skip_table_creation=True)


def with_driver(url: str) -> str:
    """With the driver that is installed: where none is named SQLAlchemy before 2.1 looks for an older one."""
    return url.replace("postgresql://", "postgresql+psycopg://", 1)


def _connect_patiently(url: URL, dialect: Any, _: Any, args: Any, options: Any) -> Any:
    """Connect as SQLAlchemy does, again and again while the server is away."""

    def connect() -> Any:
        try:
            return dialect.connect(*args, **options)
        except dialect.dbapi.OperationalError as error:
            raise ConnectionError(one_line(str(error), 300)) from None

    return patiently(PATIENCE_S, connect, lambda why: logger.warning("waiting for the study in %s: %s", url, why))


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
