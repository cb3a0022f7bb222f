"""Where a command is asked to write: looked at before anything is worked out, made only when it is."""

import os
import sys
from collections.abc import Collection
from pathlib import Path

from inflora.config import ConfigError
from inflora.errors import one_line
from inflora.files import why_unwritable, write_atomically

STDOUT = Path("-")


def check_output(path: Path, endings: Collection[str]) -> None:
    """Check that a file of one of these endings can be written; ``-`` is standard output.

    Raises:
        ConfigError: A folder, a name of another kind, or a place that cannot be written to.
    """
    if path == STDOUT:
        return
    shown = repr(one_line(str(path), 200))
    try:
        is_other = path.exists() and not path.is_file()
    except OSError as error:
        raise ConfigError(f"cannot write {shown}: {error.strerror}") from None
    if is_other:
        raise ConfigError(f"-o must name a file ({', '.join(endings)}, or - for standard output), got {shown}")
    if path.suffix.lower() not in endings:
        raise ConfigError(f"-o must end in {' or '.join(endings)}, or be - for standard output, got {shown}")
    check_can_write(path.absolute().parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise ConfigError(f"cannot write {shown}: it may not be changed")


def check_can_write(folder: Path) -> None:
    """Raise ConfigError unless files can be written into ``folder``, or it can be made; it is not."""
    if problem := why_unwritable(folder):
        raise ConfigError(f"cannot write into {one_line(str(folder), 200)}: {problem}")


def deliver(path: Path, content: str, said: str) -> None:
    """Write what a command was asked for, and say so; on standard output only the content itself."""
    if path == STDOUT:
        sys.stdout.write(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.encode())
    print(said)
