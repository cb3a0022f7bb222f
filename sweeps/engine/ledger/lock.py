"""The lock of a sweep's folder: one driver at a time, as far as one machine sees."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from inflora.config import ConfigError

LOCK_FILE = ".lock"
"""The lock in a sweep's folder that its driver holds as long as it lives."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a sweep's folder, which is made if it is not there.

    Raises:
        ConfigError: Another driver is at work there, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_FILE).open("w")
    except OSError as error:
        raise ConfigError(f"cannot write into {folder}: {error.strerror}") from None
    with lock:
        if not _acquire(lock):
            raise ConfigError(f"the sweep in {folder} is being run by another process")
        yield


def is_driven(folder: Path) -> bool:
    """True while a driver of the sweep in ``folder`` is alive."""
    try:
        with (folder / LOCK_FILE).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # there was never one, or it cannot be asked
    return False


def _acquire(lock: IO[str]) -> bool:
    """Take a lock that no driver holds; one who only asks for drivers holds it for a moment."""
    for _ in range(10):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(0.05)
        else:
            return True
    return False
