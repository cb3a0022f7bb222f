"""A place that every machine of a cluster sees under one address: a folder, or a bucket's (``s3://bucket/path``)."""

import contextlib
import uuid
from pathlib import Path

from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem

from inflora.config import ConfigError


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

    @property
    def is_local(self) -> bool:
        """True of a folder, false of a bucket."""
        return "://" not in self.address

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
