"""Files of other people's: regular ones only, of a bounded size, opened without waiting."""

import io
import stat
from pathlib import Path

from inflora.data.errors import DataError, brief

MOST_BYTES = 1 << 29
"""The largest file that is read into memory as a whole; the largest of any dataset's has a third of it."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def file_size(path: Path) -> int:
    """The size of a regular file.

    Raises:
        DataError: It is none, or not there: whoever opens a named pipe waits for ever.
    """
    try:
        facts = path.stat()
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or brief(error)}") from None
    if not stat.S_ISREG(facts.st_mode):
        raise DataError(f"{path} is {_KINDS.get(stat.S_IFMT(facts.st_mode), 'no file')}; expected a file")
    return facts.st_size


def open_file(path: Path) -> io.BufferedReader:
    """A regular file, to be read.

    Raises:
        DataError: It is none, or cannot be opened.
    """
    file_size(path)
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def read_file(path: Path) -> bytes:
    """The content of a regular file.

    Raises:
        DataError: It is none, cannot be read, or has more than ``MOST_BYTES``.
    """
    within_bounds(file_size(path), str(path))
    with open_file(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def within_bounds(size: int, name: str) -> None:
    """Raise DataError for a file that is too large to be read at once."""
    if size > MOST_BYTES:
        raise DataError(f"{name} has {size:,} bytes; at most {MOST_BYTES:,} are read at once: a wrong or damaged file")
