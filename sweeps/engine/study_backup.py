"""A copy of the study in the sweep's shared place, which outlives its driver.

The study itself is a database on the driver's own disk, which a network file system or a bucket would break.
"""

import sqlite3
import tempfile
from pathlib import Path

from inflora.files import write_atomically
from inflora.storage import SharedFolder


def keep_database(file: Path, shared: SharedFolder) -> None:
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


def fetch_database(file: Path, shared: SharedFolder) -> bool:
    """Bring a database that was kept back to where it is missing; whether that was done."""
    content = None if file.exists() else shared.read(file.name)
    if content is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content)
    return content is not None
