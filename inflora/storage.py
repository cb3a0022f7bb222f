"""A place that every machine of a cluster sees under one address: a folder, or a bucket's (``s3://bucket/path``)."""

import contextlib
import logging
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem, copy_files

from inflora.config import ConfigError
from inflora.errors import one_line
from inflora.patience import patiently

T = TypeVar("T")
logger = logging.getLogger(__name__)

PATIENCE_S = 900.0
"""The time for which a place may be away before those who need it give up."""


class SharedFolder:
    """Files in it are written whole or not at all, also where several machines write the same one at a time."""

    def __init__(self, address: str) -> None:
        self.address = address if "://" in address else str(Path(address).expanduser().absolute())
        try:
            self._files, self._path = FileSystem.from_uri(self.address)
        except (ValueError, OSError) as error:
            raise ConfigError(
                f"shared storage must be a folder or s3://bucket/path, got {address!r}: {error}"
            ) from None
        if isinstance(self._files, LocalFileSystem):
            self.address = self._path  # also of file:///path

    @property
    def is_local(self) -> bool:
        """True of a folder, false of a bucket."""
        return "://" not in self.address

    def require(self) -> None:
        """Raise OSError unless the place is there.

        A folder that is not mounted looks empty, and takes files that nobody finds when it is.
        """
        found = self._files.get_file_info(self._path)
        if self.is_local and found.type is not FileType.Directory:
            raise FileNotFoundError(f"there is no folder {self.address}")

    def when_there(self, do: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
        """Do what needs the place: what raises OSError is done again until the place is back.

        Raises:
            OSError: It was away for longer than so many seconds.
        """

        def attempt() -> T:
            self.require()
            return do()

        return patiently(
            patience_s, attempt, lambda why: logger.warning("waiting for %s: %s", self.address, one_line(why, 300))
        )

    def make(self, name: str) -> None:
        """Make a folder in it; a bucket has none."""
        if self.is_local:
            self._files.create_dir(f"{self._path}/{name}")

    def read(self, name: str) -> bytes | None:
        """A file's content; None where it is not there."""
        if self._files.get_file_info(f"{self._path}/{name}").type is FileType.NotFound:
            return None
        with self._files.open_input_stream(f"{self._path}/{name}") as file:
            return bytes(file.read())

    def write(self, name: str, content: bytes) -> None:
        """Write a file; of several writers the last one's stays."""
        if not isinstance(self._files, LocalFileSystem):
            self._write(name, content)  # a bucket shows a file when all of it has come
            return
        temporary = f".{name}.{uuid.uuid4().hex}"
        self._files.create_dir(self._path)
        self._write(temporary, content)
        self._files.move(f"{self._path}/{temporary}", f"{self._path}/{name}")

    def _write(self, name: str, content: bytes) -> None:
        with self._files.open_output_stream(f"{self._path}/{name}") as file:
            file.write(content)

    def delete(self, name: str) -> None:
        """Remove a file."""
        self._files.delete_file(f"{self._path}/{name}")

    def folders(self, name: str) -> set[str]:
        """The names of the folders in a folder."""
        return {found.base_name for found in self._below(name) if found.type is FileType.Directory}

    def files(self, name: str) -> set[str]:
        """The names of the files in a folder."""
        return {found.base_name for found in self._below(name) if found.type is FileType.File}

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """A folder of it as one of this machine, to be read; empty, or not there, where there is none."""
        if self.is_local:
            yield Path(self._path) / name
            return
        with tempfile.TemporaryDirectory() as temporary:
            self.copy_to(name, Path(temporary))
            yield Path(temporary)

    def copy_to(self, name: str, folder: Path) -> None:
        """Copy all that is below a folder of it into one of this machine; nothing where there is none."""
        if self._files.get_file_info(f"{self._path}/{name}").type is FileType.Directory:
            copy_files(f"{self._path}/{name}", str(folder), source_filesystem=self._files)

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
