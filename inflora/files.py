"""Files: only regular ones are read, without waiting for anything; what is written is there whole or not at all."""

import contextlib
import hashlib
import os
import stat
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryFile

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def exists(path: Path) -> bool:
    """True of what is there; a name that no file can have is not."""
    try:
        return path.exists()
    except OSError:
        return False


def nearest(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if os.path.lexists(each))


def why_unwritable(folder: Path) -> str:
    """The reason why no file can be written into ``folder``, or the folder cannot be made; empty where it can.

    Nothing is left behind.
    """
    there = nearest(folder)
    try:
        with contextlib.suppress(FileNotFoundError):
            folder.stat()  # a name that no folder can have
        with TemporaryFile(dir=there):  # rights alone do not tell of file systems that are read-only or full
            return ""
    except OSError as error:
        return f"{str(there)[:200]} is not a folder that may be written to ({error.strerror})"


def require_regular(path: Path) -> int:
    """The size of a regular file: whoever opens a named pipe waits for ever, and a device has no end.

    Raises:
        OSError: It is something else, or not there.
    """
    try:
        facts = path.stat()
    except ValueError as error:  # a NUL in the name
        raise OSError(0, str(error), str(path)) from None
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(0, f"it is {_KINDS.get(stat.S_IFMT(facts.st_mode), 'no file')}, expected a file", str(path))
    return facts.st_size


def read_regular(path: Path, at_most: int = -1) -> bytes:
    """The content of a regular file, or its beginning.

    Raises:
        OSError: It cannot be read, or is something else.
    """
    require_regular(path)
    with path.open("rb") as file:
        return file.read(at_most)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a crash or on a full disk.

    Nothing is left of it where that fails, or is interrupted; of a process that was killed ``remove_torn`` takes it.

    Raises:
        OSError: One that names the file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, f"cannot write: {error.strerror or error}", str(path)) from None
        raise


def remove_torn(folder: Path, pattern: str) -> None:
    """Remove what processes that are gone had begun to write of files of such names."""
    for temporary in folder.glob(f".{pattern}.*"):
        pid = temporary.suffix.removeprefix(".")
        if pid.isdecimal() and not Path("/proc", pid).exists():
            temporary.unlink(missing_ok=True)


def source_hash(*packages: str) -> str:
    """A hash of some packages' Python files: two states of one version differ."""
    digest = hashlib.sha256()
    for package in packages:
        root = Path(str(files(package)))
        for file in sorted(root.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:8]
