"""Datasets: stores on disk, streams of tasks, augmentation on the device.

A dataset is one short file that reads what its authors give away, and one line in ``DATASETS``.
"""

from collections.abc import Callable
from pathlib import Path

from inflora.config import ConfigError
from inflora.data import (
    cars,
    cifar100,
    core50,
    cub200,
    digits,
    domainnet,
    generated,
    image_folder,
    imagenet_variants,
    office_home,
    pilot,
    remote,
)
from inflora.data.manifest import read_manifest
from inflora.data.preparation import Progress, check_name, prepare
from inflora.data.source import Dataset, Options
from inflora.data.store import default_root

DATASETS: dict[str, Dataset] = {
    "digits": Dataset(digits.read, needs=None),
    "strokes": generated.STROKES,
    "woven": generated.WOVEN,
    "cifar100": Dataset(cifar100.read, "cifar-100-python.tar.gz, the folder in it, or a folder with the parquet files"),
    "imagenet_r": Dataset(
        imagenet_variants.read_r, "imagenet-r.tar or the folder in it", frozenset({"test_list", "split_seed"})
    ),
    "imagenet_a": Dataset(
        imagenet_variants.read_a, "imagenet-a.tar or the folder in it", frozenset({"test_list", "split_seed"})
    ),
    "domainnet": Dataset(domainnet.read, "a folder with DomainNet's zips and list files", frozenset({"domains"})),
    "cub200": Dataset(cub200.read, "CUB_200_2011.tgz or the folder in it"),
    "cars": Dataset(
        cars.read, "a folder with cars_train.tgz, cars_test.tgz, car_devkit.tgz and the labelled test .mat"
    ),
    "objectnet": Dataset(pilot.reader(pilot.OBJECTNET), "PILOT's zip of ObjectNet or the folder in it"),
    "omnibenchmark": Dataset(pilot.reader(pilot.OMNIBENCHMARK), "PILOT's zip of OmniBenchmark or the folder in it"),
    "vtab": Dataset(pilot.reader(pilot.VTAB), "PILOT's zip of VTAB or the folder in it"),
    "office_home": Dataset(
        office_home.read,
        "OfficeHomeDataset_10072016.zip or the folder in it",
        frozenset({"domains", "split_seed"}),
    ),
    "core50": Dataset(core50.read, "core50_128x128.zip or the folder in it", frozenset({"domains"})),
    "image_folder": Dataset(image_folder.read, "a folder, tar or zip with train/<class>/* and test/<class>/*"),
}


def known_dataset(name: str) -> Dataset:
    """A line of ``DATASETS``.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in DATASETS:
        raise ConfigError(f"unknown dataset {name!r}; known: {', '.join(DATASETS)} (any other name with --format)")
    return DATASETS[name]


def prepare_store(
    name: str,
    dataset: Dataset,
    source: Path,
    options: Options,
    root: str | None = None,
    shorter_side: int | None = None,
    *,
    subset: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Path:
    """``prepare`` below ``root``, or in this machine's cache and then copied to ``root`` where that is a URI.

    Raises:
        ConfigError, DataError: As ``prepare`` and ``remote.upload``.
    """
    check_name(name)
    elsewhere = root if root is not None and remote.is_remote(root) else None
    if elsewhere:
        remote.stored_at(elsewhere, name)  # an address that leads nowhere is refused before hours of work
    folder = remote.prepared_here(elsewhere, name) if elsewhere else _root(root) / name
    prepare(folder, name, dataset, source, options, shorter_side=shorter_side, subset=subset, on_progress=on_progress)
    if elsewhere:
        remote.upload(folder, elsewhere, name)
    return folder


def store_address(dataset: str, root: str | None = None) -> str:
    """Where a dataset's store lies: a URI, or a folder of this machine."""
    return f"{root}/{dataset}" if root is not None and remote.is_remote(root) else str(_root(root).absolute() / dataset)


def ensure_store(dataset: str, root: str | None = None) -> Path:
    """The folder of a dataset's store, on this machine; fetched or, where nothing is needed for it, prepared now.

    Raises:
        ConfigError: No such store, nor a dataset that could be prepared without its files.
        DataError: What is there cannot be read.
    """
    check_name(dataset)
    if root is not None and remote.is_remote(root):
        return remote.fetch(root, dataset)
    folder = _root(root) / dataset
    if folder.exists():
        read_manifest(folder)
        return folder
    if dataset not in DATASETS:
        there = [path.parent.name for path in sorted(folder.parent.glob("*/manifest.json"))]
        known = ", ".join(dict.fromkeys([*DATASETS, *there]))
        raise ConfigError(f"unknown data.dataset {dataset!r}; known: {known}")
    needs = DATASETS[dataset].needs
    if needs is not None:
        raise ConfigError(
            f"{dataset} is not in {folder.parent}; prepare it once: inflora data prepare {dataset} --source PATH "
            f"--root {folder.parent} (PATH: {needs})"
        )
    prepare(folder, dataset, DATASETS[dataset], Path(), Options())
    return folder


def _root(root: str | None) -> Path:
    """The folder of stores: this machine's cache unless another is named."""
    if root is None:
        return default_root()
    if not root.strip():
        raise ConfigError(f"the root of stores must be a folder or a URI (s3://...), got {root!r}")
    return Path(root)
