"""Folders, tar files and zip files as one thing: named files that can be read in any order, by several threads.

Nothing is ever unpacked under the names in an archive, so no name can lead out of a folder.
"""

import gzip
import hashlib
import os
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, Protocol

from inflora.data.errors import DataError, brief
from inflora.data.files import file_size, open_file, read_file, within_bounds

_MOST_UNPACKED = 1 << 30
_MOST_TIMES_PACKED = 50
"""A gzip file may unpack to the larger of these bounds; images shrink by a few per cent."""
_CHUNK = 1 << 20


class Tree(Protocol):
    """Named files; names are relative, with forward slashes; bytes that are no UTF-8 are in them as surrogates."""

    names: frozenset[str]

    def read(self, name: str) -> bytes:
        """The content of one file."""
        ...


class FolderTree:
    """The files of a folder, with their ``sizes``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.sizes = {file.relative_to(folder).as_posix(): file_size(file) for file in _files_below(folder)}
        self.names = frozenset(self.sizes)

    def read(self, name: str) -> bytes:
        return read_file(self._folder / name)


def _files_below(folder: Path) -> Iterable[Path]:
    """Everything but folders, at any depth."""

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read {error.filename}: {error.strerror}")

    for at, folders, names in os.walk(folder, onerror=refuse):
        if linked := next((name for name in folders if Path(at, name).is_symlink()), None):
            raise DataError(f"{Path(at, linked)} is a link to a folder, which is not followed; copy what it links to")
        yield from (Path(at, name) for name in names)


class TarTree:
    """The regular files of an uncompressed tar, found once and then read from where they lie."""

    def __init__(self, file: IO[bytes], shown_as: Path) -> None:
        self._file, self._shown_as = file, shown_as
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members = list(_members(tar))
                end = tar.offset
        except Exception as error:  # whatever damaged headers make of themselves
            raise DataError(f"{shown_as} is no tar file or a damaged one ({brief(error)}); download it again") from None
        # tarfile takes whatever it cannot read for the end; a block of zeros is the end.
        if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
            last = members[-1].name if members else "its beginning"
            raise DataError(f"{shown_as} is cut off or damaged within or after {last}; download it again")
        self._places = {
            _plain(member.name): (member.offset_data, member.size) for member in members if not member.isdir()
        }
        self.names = frozenset(self._places)

    def read(self, name: str) -> bytes:
        offset, size = self._places[name]
        within_bounds(size, f"{name} in {self._shown_as}")
        try:
            content = os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise DataError(f"cannot read {self._shown_as}: {error.strerror}") from None
        if len(content) < size:
            raise DataError(f"{self._shown_as} is cut off within {name}; download it again")
        return content


def _members(tar: tarfile.TarFile) -> Iterable[tarfile.TarInfo]:
    """Folders and regular files; a link or a sparse file in an image's place would be a missing or a wrong image."""
    offset = -1
    for member in tar:
        if member.size < 0 or tar.offset <= offset:  # such a header leads back: an archive without an end
            raise tarfile.ReadError(f"a header after {member.name} makes no sense")
        offset = tar.offset
        if member.issparse() or not (member.isreg() or member.isdir()):
            raise tarfile.ReadError(f"{member.name} is a link, sparse or a device; only regular files are read")
        yield member


class ZipTree:
    """The files of a zip; their checksums are checked as they are read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._zip = zipfile.ZipFile(open_file(path))
        except DataError:
            raise
        except Exception as error:  # a newer version's, names that are none, ...
            raise DataError(f"{path} is no zip file or a damaged one ({brief(error)}); download it again") from None
        self._members = {_zip_name(info): info for info in self._zip.infolist() if not info.is_dir()}
        self.names = frozenset(self._members)

    def read(self, name: str) -> bytes:
        info = self._members[name]
        within_bounds(info.file_size, f"{name} in {self._path}")
        try:
            return self._zip.read(info)
        except Exception as error:  # each way of compression has errors of its own
            raise DataError(f"{name} in {self._path} is damaged ({brief(error)}); download it again") from None


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Names without the flag for UTF-8 are often UTF-8 all the same; zipfile takes them for MS-DOS's letters."""
    utf8_flag = 0x800
    if info.flag_bits & utf8_flag:
        return _plain(info.filename)
    try:
        return _plain(info.filename.encode("cp437").decode())
    except UnicodeError:
        return _plain(info.filename)


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
    """A folder, ``.tar``, ``.tar.gz`` / ``.tgz`` or ``.zip``; gzip is undone into a file without a name in ``scratch``.

    Raises:
        DataError: There is nothing, or something else, or something damaged.
    """
    expected = "--source must be a folder, .tar, .tar.gz, .tgz or .zip"
    try:
        if source.is_dir():
            tree = FolderTree(source)
            return Opened(tree, folder_origin(source, tree))
        if not source.exists():
            raise DataError(f"{source} does not exist; {expected}")
        file = open_file(source)
        head = file.read(4)
        file.seek(0)
    except OSError as error:
        raise DataError(f"cannot read {source}: {error.strerror}; {expected}") from None
    if head.startswith(b"PK"):
        return Opened(ZipTree(source), file_origin(source))
    if head.startswith(b"\x1f\x8b"):
        return Opened(TarTree(_unpacked(file, source, scratch), source), file_origin(source))
    return Opened(TarTree(file, source), file_origin(source))


def _unpacked(packed: IO[bytes], source: Path, scratch: Path) -> IO[bytes]:
    """The content of a gzip file, as a file that vanishes with its last user, however that one ends."""
    most = max(_MOST_UNPACKED, _MOST_TIMES_PACKED * file_size(source))
    plain = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115
    try:
        with gzip.open(packed) as content:
            while chunk := content.read(_CHUNK):
                if plain.tell() > most:
                    raise EOFError(f"it unpacks to more than {most:,} bytes")
                plain.write(chunk)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{source} is damaged ({brief(error)}); download it again") from None
    plain.seek(0)
    return plain


def file_origin(path: Path) -> str:
    """A source file's name with the hash of its content.

    Raises:
        DataError: It cannot be read.
    """
    with open_file(path) as file:
        try:
            return f"{legible(path.name)} sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None


def folder_origin(folder: Path, tree: FolderTree) -> str:
    """A folder's name with the hash of its files' names and sizes."""
    listing = "\n".join(f"{name} {tree.sizes[name]}" for name in sorted(tree.names))
    digest = hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()
    return f"{legible(folder.resolve().name)}/ listing sha256 {digest[:16]}"


def legible(name: str) -> str:
    """A file's name as text; one that is no UTF-8 is taken for Latin-1."""
    try:
        return name.encode(errors="surrogateescape").decode()
    except UnicodeDecodeError:
        return name.encode(errors="surrogateescape").decode("latin-1")


def text(content: bytes, name: str) -> str:
    """The content of a text file.

    Raises:
        DataError: It is no text.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{name} is not a text file in UTF-8: a wrong or damaged source") from None


def below(tree: Tree, folder: str) -> dict[str, str]:
    """The files in any folder of that name: path from there -> full name."""

    def path_from_there(name: str) -> str | None:
        parts = PurePosixPath(name).parts
        return "/".join(parts[parts.index(folder) + 1 :]) if folder in parts[:-1] else None

    return by_path({name: path for name in tree.names if (path := path_from_there(name))})


def by_path(paths: Mapping[str, str]) -> dict[str, str]:
    """Path -> full name, of full name -> path.

    Raises:
        DataError: Two files have the same path: one of them would be lost.
    """
    found: dict[str, str] = {}
    for name, path in paths.items():
        if found.setdefault(path, name) != name:
            raise DataError(f"{found[path]} and {name} in the source are both {path}; keep one of them")
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
