"""Stores on object storage: copied to this machine once, whoever asks first."""

import hashlib
import shutil
from pathlib import Path

import pyarrow as pa
from filelock import FileLock
from pyarrow import fs

from inflora.config import ConfigError
from inflora.data.errors import DataError, brief
from inflora.data.manifest import parse_manifest
from inflora.data.preparation import lock_of
from inflora.data.store import default_root, verify_split
from inflora.patience import NoAnswerError, within

_PATIENCE_S = 20.0
"""The longest that a bucket's first answer may take."""


def is_remote(root: str) -> bool:
    """True if ``root`` is a URI such as ``s3://bucket/folder``, and not a folder."""
    return "://" in root


def prepared_here(root: str, dataset: str) -> Path:
    """The folder in which this machine prepares a store before it goes to ``root``."""
    return default_root() / "remote" / hashlib.sha256(root.encode()).hexdigest()[:12] / dataset


def fetch(root: str, dataset: str) -> Path:
    """This machine's copy of a remote store, made now if it has none; one process copies, the others wait.

    A copy is known by the remote manifest: where the store at ``root`` has changed, it is fetched anew.

    Raises:
        ConfigError: A URI that names no file system that is known here.
        DataError: There is no such store, it cannot be read, or it was damaged on the way.
    """
    manifest = stored_at(root, dataset)
    if manifest is None:
        raise DataError(f"no dataset store {dataset} in {root}")
    splits = parse_manifest(manifest, f"{root}/{dataset}").splits  # before gigabytes come that cannot be read
    prepared = prepared_here(root, dataset)
    if _manifest_in(prepared) == manifest:
        return prepared
    folder = prepared.with_name(f"{dataset}-{hashlib.sha256(manifest).hexdigest()[:12]}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    system, path = _resolve(root)
    with FileLock(lock_of(folder)):
        # Asked again under the lock: another process may have copied it meanwhile.
        if not folder.exists():
            staging = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            try:
                fs.copy_files(f"{path}/{dataset}", str(staging), source_filesystem=system)
                for split in splits:
                    verify_split(staging, split)
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"cannot fetch {root}/{dataset}: {brief(error)}") from None
            except DataError as error:
                reason = str(error).replace(str(staging), dataset).split(";")[0].split("damaged: ")[-1]
                raise DataError(f"the store at {root} is damaged: {reason}; prepare it there again") from None
            staging.rename(folder)
    return folder


def upload(folder: Path, root: str, dataset: str) -> None:
    """Copy a local store to object storage, unless it is there; the manifest last, so that half a store is none.

    Raises:
        ConfigError, DataError: As ``fetch``; or another store is there.
    """
    there = stored_at(root, dataset)
    if there == _manifest_in(folder):
        return
    if there is not None:
        raise DataError(f"{root}/{dataset} holds another store; remove it or choose another --root")
    system, path = _resolve(root)
    files = sorted(folder.iterdir(), key=lambda file: file.name == "manifest.json")
    try:
        system.create_dir(f"{path}/{dataset}")
        for file in files:
            fs.copy_files(str(file), f"{path}/{dataset}/{file.name}", destination_filesystem=system)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot upload to {root}/{dataset}: {brief(error)}") from None


def stored_at(root: str, dataset: str) -> bytes | None:
    """The text of the manifest of a remote store; None where there is none.

    Raises:
        ConfigError: A URI that names no file system that is known here.
        DataError: What it names cannot be read.
    """

    def manifest() -> bytes | None:
        system, path = _resolve(root)
        file = f"{path}/{dataset}/manifest.json"
        if system.get_file_info(file).type != fs.FileType.File:
            return None
        with system.open_input_stream(file) as stream:
            return bytes(stream.read())

    try:
        return within(_PATIENCE_S, manifest)
    except NoAnswerError as error:
        raise DataError(f"data.root {root} {error}") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {root}: {brief(error)}") from None


def _manifest_in(folder: Path) -> bytes | None:
    path = folder / "manifest.json"
    return path.read_bytes() if path.exists() else None


def _resolve(root: str) -> tuple[fs.FileSystem, str]:
    try:
        system, path = fs.FileSystem.from_uri(root)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise ConfigError(f"data.root {root}: {error}; known are folders, s3://, gs://, abfs:// and file://") from None
    return system, path.rstrip("/")
