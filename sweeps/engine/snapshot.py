"""Databases of a sweep's folder, read without leaving a trace: a copy in memory, checked, of what is there now."""

import fcntl
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

LOCK_FILE = ".lock"
"""What a driver holds, in its sweep's folder, as long as it lives."""

_SIDECARS = ("-wal", "-journal")


def is_driven(folder: Path) -> bool:
    """Whether a driver of the sweep in ``folder`` is alive."""
    try:
        with (folder / LOCK_FILE).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # there was never one, or it cannot be asked
    return False


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
                copy = Path(folder) / "database"
                shutil.copyfile(file, copy)
                for sidecar in _SIDECARS:
                    beside = file.with_name(file.name + sidecar)
                    if beside.is_file():
                        shutil.copyfile(beside, f"{copy}{sidecar}")
                _copy(copy.as_uri(), memory)
        (found,) = memory.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)
    except BaseException:
        memory.close()
        raise
    return memory


def _would_be_written_to(file: Path) -> bool:
    """Whether opening the database, even to read, leaves something behind: it is, or was, in the middle of a change."""
    with file.open("rb") as content:
        header = content.read(20)
    is_write_ahead = header[18:20] == b"\x02\x02"
    return is_write_ahead or any(file.with_name(file.name + sidecar).exists() for sidecar in _SIDECARS)


def _copy(uri: str, memory: sqlite3.Connection) -> None:
    with closing(sqlite3.connect(uri, uri=True, timeout=5)) as source:
        source.backup(memory)
