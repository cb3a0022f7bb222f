"""Copies of SQLite databases: in memory, to read one without leaving a trace, and in the shared place, as a backup.

The study is a database on the driver's own disk, which a network file system or a bucket would break.
"""

import contextlib
import shutil
import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from inflora.files import write_atomically
from sweeps.engine.ledger.lock import is_driven

if TYPE_CHECKING:
    from inflora.storage import SharedFolder  # brings pyarrow along, for which `sweeps status` must not wait

_SIDECARS = ("-wal", "-journal")
_TRIES = 20


def snapshot(file: Path) -> sqlite3.Connection:
    """A copy in memory of a SQLite database as it is now; neither the file nor what lies beside it is touched.

    Even a reader would recover what a killed writer has left, or make the files of a write-ahead log: such a database
    is copied with them first. One that is being written to is read through SQLite's own locks.

    Raises:
        OSError, sqlite3.Error: No file, no database, or one that does not agree with itself.
    """
    if not file.is_file():
        raise IsADirectoryError(f"{file.name} is no file") if file.exists() else FileNotFoundError("it is not there")
    memory = sqlite3.connect(":memory:", check_same_thread=False)
    try:
        if is_driven(file.parent) or not _would_be_written_to(file):
            _copy(f"{file.absolute().as_uri()}?mode=ro", memory)
        else:
            with tempfile.TemporaryDirectory() as folder:
                _copy(_consistent_copy(file, Path(folder)).as_uri(), memory)
        (found,) = memory.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)
    except BaseException:
        memory.close()
        raise
    return memory


def _consistent_copy(file: Path, folder: Path) -> Path:
    """A copy of a database and its journals in ``folder``, taken between two changes where somebody is at it."""
    copy = folder / "database"
    for _ in range(_TRIES):
        before = _fingerprint(file)
        for suffix in ("", *_SIDECARS):
            beside = file.with_name(file.name + suffix)
            copied = copy.with_name(copy.name + suffix)
            copied.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(beside, copied)
        if _fingerprint(file) == before:
            break
        time.sleep(0.05)
    return copy


def _fingerprint(file: Path) -> list[tuple[int, int] | None]:
    """Size and time of a database and its journals."""
    found: list[tuple[int, int] | None] = []
    for suffix in ("", *_SIDECARS):
        try:
            facts = file.with_name(file.name + suffix).stat()
            found.append((facts.st_size, facts.st_mtime_ns))
        except FileNotFoundError:
            found.append(None)
    return found


def _would_be_written_to(file: Path) -> bool:
    """True if opening the database, even to read, leaves something behind: it is, or was, amid a change."""
    with file.open("rb") as content:
        header = content.read(20)
    is_write_ahead = header[18:20] == b"\x02\x02"
    return is_write_ahead or any(file.with_name(file.name + sidecar).exists() for sidecar in _SIDECARS)


def _copy(uri: str, memory: sqlite3.Connection) -> None:
    with closing(sqlite3.connect(uri, uri=True, timeout=5)) as source:
        source.backup(memory)


def keep_database(file: Path, shared: "SharedFolder") -> None:
    """Copy a sqlite database, as it is at one moment, to the shared place."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / file.name
        source, target = sqlite3.connect(file), sqlite3.connect(copy)
        try:
            source.backup(target)
        finally:
            source.close()
            target.close()
        shared.write(file.name, copy.read_bytes())


def fetch_database(file: Path, shared: "SharedFolder", *, replace: bool = False) -> bool:
    """Bring a database that was kept back to where it is missing, or is to be replaced; whether that was done."""
    content = None if file.exists() and not replace else shared.read(file.name)
    if content is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        # The log of what was there would be applied to this one; a stop between leaves a database that is missing.
        for suffix in ("", *_SIDECARS, "-shm"):
            file.with_name(file.name + suffix).unlink(missing_ok=True)
        write_atomically(file, content)
    return content is not None
