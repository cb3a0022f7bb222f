"""Folders, tar files and zip files as one thing: named files that can be read in any order, by several threads.

Nothing is ever unpacked under the names in an archive, so no name can lead out of a folder.
"""

import gzip
import hashlib
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

from inflora.data.store import DataError


class Tree(Protocol):
    """Named files; names are relative, with forward slashes."""

    names: frozenset[str]

    def read(self, name: str) -> bytes:
        """The content of one file."""
        ...


class FolderTree:
    """The files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        files = (Path(at) / name for at, _, names in os.walk(folder) for name in names)
        self.names = frozenset(file.relative_to(folder).as_posix() for file in files)

    def read(self, name: str) -> bytes:
        try:
            return (self._folder / name).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {self._folder / name}: {error.strerror}") from None


class TarTree:
    """The files of an uncompressed tar, found once and then read from where they lie."""

    def __init__(self, path: Path, shown_as: Path) -> None:
        self._shown_as = shown_as
        self._file = os.open(path, os.O_RDONLY)
        try:
            with tarfile.open(path, "r:") as tar:
                members = [member for member in tar if member.isreg()]
                end = tar.offset
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(f"{shown_as} is no tar file or a damaged one ({error}); download it again") from None
        # tarfile takes whatever it cannot read for the end; a block of zeros is the end.
        if os.pread(self._file, tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
            last = members[-1].name if members else "its beginning"
            raise DataError(f"{shown_as} is cut off or damaged within or after {last}; download it again")
        self._places = {_plain(member.name): (member.offset_data, member.size) for member in members}
        self.names = frozenset(self._places)

    def __del__(self) -> None:
        os.close(self._file)

    def read(self, name: str) -> bytes:
        offset, size = self._places[name]
        try:
            content = os.pread(self._file, size, offset)
        except OSError as error:
            raise DataError(f"cannot read {self._shown_as}: {error.strerror}") from None
        if len(content) < size:
            raise DataError(f"{self._shown_as} is cut off within {name}; download it again")
        return content


class ZipTree:
    """The files of a zip; their checksums are checked as they are read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{path} is no zip file or a damaged one ({error}); download it again") from None
        self._members = {_plain(info.filename): info for info in self._zip.infolist() if not info.is_dir()}
        self.names = frozenset(self._members)

    def read(self, name: str) -> bytes:
        try:
            return self._zip.read(self._members[name])
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:
            raise DataError(f"{name} in {self._path} is damaged ({error}); download it again") from None


class JoinedTree:
    """Several trees as one."""

    def __init__(self, trees: Iterable[Tree]) -> None:
        self._tree_of = {name: tree for tree in trees for name in tree.names}
        self.names = frozenset(self._tree_of)

    def read(self, name: str) -> bytes:
        return self._tree_of[name].read(name)


class Opened(NamedTuple):
    """A tree and what it was opened from: file names with the hash of their content."""

    tree: Tree
    origin: str


def open_tree(source: Path, scratch: Path) -> Opened:
    """A folder, ``.tar``, ``.tar.gz`` / ``.tgz`` or ``.zip``; gzip is undone into ``scratch`` first.

    Raises:
        DataError: There is nothing, or something else, or something damaged.
    """
    if source.is_dir():
        tree = FolderTree(source)
        return Opened(tree, folder_origin(source, tree))
    if not source.is_file():
        raise DataError(f"--source {source} does not exist; it must be a folder, .tar, .tar.gz, .tgz or .zip")
    if zipfile.is_zipfile(source):
        return Opened(ZipTree(source), file_origin(source))
    with source.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    if compressed:
        unpacked = scratch / f"{source.name}.tar"
        try:
            with gzip.open(source) as packed, unpacked.open("wb") as plain:
                shutil.copyfileobj(packed, plain, 1 << 20)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{source} is damaged ({error}); download it again") from None
        return Opened(TarTree(unpacked, source), file_origin(source))
    return Opened(TarTree(source, source), file_origin(source))


def file_origin(path: Path) -> str:
    """A source file's name with the hash of its content.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return f"{path.name} sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def folder_origin(folder: Path, tree: Tree) -> str:
    """A folder's name with the hash of its files' names and sizes."""
    listing = "\n".join(f"{name} {(folder / name).stat().st_size}" for name in sorted(tree.names))
    name = folder.resolve().name
    return f"{name}/ listing sha256 {hashlib.sha256(listing.encode()).hexdigest()[:16]}"


def text(content: bytes, name: str) -> str:
    """The content of a text file.

    Raises:
        DataError: It is no text.
    """
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise DataError(f"{name} is not a text file: a wrong or damaged source") from None


def below(tree: Tree, folder: str) -> dict[str, str]:
    """The files in any folder of that name: path from there -> full name."""
    found = {}
    for name in tree.names:
        parts = PurePosixPath(name).parts
        if folder in parts[:-1]:
            found["/".join(parts[parts.index(folder) + 1 :])] = name
    return found


def find(tree: Tree, file: str) -> str:
    """The full name of the file that is called so, nearest to the top.

    Raises:
        DataError: There is none.
    """
    matches = [name for name in tree.names if PurePosixPath(name).name == file]
    if not matches:
        raise DataError(f"the source holds no file {file}: a wrong or incomplete archive")
    return min(matches, key=lambda name: (name.count("/"), name))


def _plain(name: str) -> str:
    return name.removeprefix("./")
