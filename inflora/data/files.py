"""Files of other people's: regular ones only, of a bounded size, opened without waiting."""

import io
from pathlib import Path

from inflora.data.errors import DataError
from inflora.files import require_regular

MOST_BYTES = 1 << 29
"""The largest file that is read into memory as a whole; the largest of any dataset's has a third of it."""


def file_size(path: Path) -> int:
    """The size of a regular file.

    Raises:
        DataError: It is none, or not there: whoever opens a named pipe waits for ever.
    """
    try:
        return require_regular(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


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
