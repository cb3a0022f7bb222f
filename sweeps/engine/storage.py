"""A sweep's place that every node sees: the trials' checkpoints, and a copy of the study that outlives its driver.

The study itself is a database on the driver's own disk, which a network file system or a bucket would break.
"""

import contextlib
import sqlite3
import tempfile
from pathlib import Path

from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType

from inflora.config import ConfigError
from inflora.state import write_atomically


class SharedFolder:
    """A folder, or a bucket's (``s3://bucket/path``), that the driver and all nodes reach under the same address."""

    def __init__(self, address: str) -> None:
        self.address = address if "://" in address else str(Path(address).expanduser().absolute())
        try:
            self._files, self._path = FileSystem.from_uri(self.address)
        except (ValueError, OSError) as error:
            raise ConfigError(
                f"shared storage must be a folder or s3://bucket/path, got {address!r}: {error}"
            ) from None

    @property
    def is_local(self) -> bool:
        """Whether it is a folder, and not a bucket."""
        return "://" not in self.address

    def read(self, name: str) -> bytes | None:
        """A file's content; None where it is not there."""
        if self._files.get_file_info(f"{self._path}/{name}").type is FileType.NotFound:
            return None
        with self._files.open_input_stream(f"{self._path}/{name}") as file:
            return bytes(file.read())

    def write(self, name: str, content: bytes) -> None:
        """Write a file so that it is there whole or not at all."""
        self._files.create_dir(self._path)
        with self._files.open_output_stream(f"{self._path}/.{name}") as file:
            file.write(content)
        self._files.move(f"{self._path}/.{name}", f"{self._path}/{name}")

    def delete(self, name: str) -> None:
        """Remove a file."""
        self._files.delete_file(f"{self._path}/{name}")

    def folders(self, name: str) -> set[str]:
        """The names of the folders in a folder."""
        return {found.base_name for found in self._below(name) if found.type is FileType.Directory}

    def bytes_in(self, name: str) -> int:
        """The bytes of all files below a folder."""
        return sum(found.size or 0 for found in self._below(name, recursive=True) if found.type is FileType.File)

    def discard(self, name: str) -> None:
        """Remove a folder with all that is in it; what cannot be removed now stays."""
        with contextlib.suppress(OSError):
            self._files.delete_dir(f"{self._path}/{name}")

    def _below(self, name: str, *, recursive: bool = False) -> list[FileInfo]:
        selector = FileSelector(f"{self._path}/{name}", allow_not_found=True, recursive=recursive)
        return self._files.get_file_info(selector)


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
