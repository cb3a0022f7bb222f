"""Stores on object storage: copied to this machine once, whoever asks first."""

import hashlib
import shutil
from pathlib import Path

import pyarrow as pa
from filelock import FileLock
from pyarrow import fs

from inflora.config import ConfigError
from inflora.data.store import DataError, default_root, read_manifest, verify_split


def is_remote(root: str) -> bool:
    """Whether ``root`` is a URI such as ``s3://bucket/folder``, and not a folder."""
    return "://" in root


def cached(root: str, dataset: str) -> Path:
    """Where this machine keeps its copy of a remote store."""
    return default_root() / "remote" / hashlib.sha256(root.encode()).hexdigest()[:12] / dataset


def fetch(root: str, dataset: str) -> Path:
    """The local copy of a remote store, made now if it is not there; one process copies, the others wait.

    Raises:
        ConfigError: A URI that names no file system that is known here.
        DataError: There is no such store, it cannot be read, or it was damaged on the way.
    """
    folder = cached(root, dataset)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            system, path = _resolve(root)
            staging = folder.with_suffix(".partial")
            shutil.rmtree(staging, ignore_errors=True)
            try:
                if system.get_file_info(f"{path}/{dataset}/manifest.json").type != fs.FileType.File:
                    raise DataError(f"no dataset store {dataset} in {root}")
                staging.mkdir()
                fs.copy_files(f"{path}/{dataset}", str(staging), source_filesystem=system)
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"cannot fetch {root}/{dataset}: {' '.join(str(error).split())[:200]}") from None
            for split in read_manifest(staging).splits:
                verify_split(staging, split)
            staging.rename(folder)
    return folder


def upload(folder: Path, root: str, dataset: str) -> None:
    """Copy a local store to object storage; the manifest last, so that half a store is none.

    Raises:
        ConfigError, DataError: As ``fetch``.
    """
    system, path = _resolve(root)
    files = sorted(folder.iterdir(), key=lambda file: file.name == "manifest.json")
    try:
        system.create_dir(f"{path}/{dataset}")
        for file in files:
            fs.copy_files(str(file), f"{path}/{dataset}/{file.name}", destination_filesystem=system)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot upload to {root}/{dataset}: {' '.join(str(error).split())[:200]}") from None


def _resolve(root: str) -> tuple[fs.FileSystem, str]:
    try:
        system, path = fs.FileSystem.from_uri(root)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise ConfigError(f"data.root {root}: {error}; known are folders, s3://, gs://, abfs:// and file://") from None
    return system, path.rstrip("/")
