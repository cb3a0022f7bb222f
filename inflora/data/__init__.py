"""Datasets: stores on disk, streams of tasks, augmentation on the device.

A dataset is one short file with a ``prepare(folder)`` and one line in ``DATASETS``.
"""

from collections.abc import Callable
from pathlib import Path

from inflora.config import ConfigError
from inflora.data import digits
from inflora.data.store import DataError, Manifest, default_root, read_manifest

DATASETS: dict[str, Callable[[Path], Manifest]] = {
    "digits": digits.prepare,
}


def ensure_store(dataset: str, root: Path | None = None) -> Path:
    """The folder of a dataset's store, prepared now if it is not there yet.

    Raises:
        ConfigError: An unknown dataset.
        DataError: What is there cannot be read.
    """
    if dataset not in DATASETS:
        raise ConfigError(f"unknown data.dataset {dataset!r}; known: {', '.join(DATASETS)}")
    folder = (root or default_root()) / dataset
    if (folder / "manifest.json").exists():
        read_manifest(folder)
    else:
        try:
            DATASETS[dataset](folder)
        except OSError as error:
            raise DataError(f"cannot write the store {folder}: {error.strerror}") from None
    return folder
