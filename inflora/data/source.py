"""A dataset's own distribution, read but not yet stored: classes, domains, labelled images."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from inflora.data.archives import Tree
from inflora.data.errors import DataError
from inflora.data.images import SUFFIXES
from inflora.data.manifest import Split


class Arrays(NamedTuple):
    """Images of one size that are decoded already: uint8 (N, H, W, C), with labels (N)."""

    pixels: np.ndarray
    labels: np.ndarray


class Entry(NamedTuple):
    """One image file."""

    name: str
    label: int
    domain: int = 0


class Files(NamedTuple):
    """Image files and the tree to read them from."""

    tree: Tree
    entries: tuple[Entry, ...]


class Source(NamedTuple):
    """A dataset as its authors give it away.

    ``origin`` says what it was read from (names and hashes); ``official`` how many "classes", "train" and "test" images
    the whole dataset has, as far as that is known. ``gaps``: a class may have no images in a split (DomainNet's
    paintings show no t-shirt to train on). ``test_domains``: those of the test images, where these are others.
    """

    origin: str
    classes: tuple[str, ...]
    splits: Mapping[Split, Arrays | Files]
    domains: tuple[str, ...] = ()
    official: Mapping[str, int] = {}
    gaps: bool = False
    test_domains: tuple[str, ...] = ()


class Options(NamedTuple):
    """The choices that some datasets leave to the user."""

    split_seed: int = 0
    test_list: Path | None = None
    domains: tuple[str, ...] = ()


class Dataset(NamedTuple):
    """One line of ``DATASETS``.

    ``read(source, options, scratch)`` reads the distribution; ``needs`` says what ``--source`` must be, None for a
    dataset that comes with the installation; ``options`` are those of ``Options`` that it knows.
    """

    read: Callable[[Path, Options, Path], Source]
    needs: str | None
    options: frozenset[str] = frozenset()


def chosen_domains(options: Options, known: Sequence[str]) -> tuple[str, ...]:
    """The domains of ``--domains`` in its order, all that are ``known`` without it.

    Raises:
        DataError: One is unknown, or named twice.
    """
    chosen = options.domains or tuple(known)
    if unknown := [name for name in chosen if name not in known]:
        raise DataError(f"--domains: {', '.join(map(repr, unknown))} unknown; known: {', '.join(known)}")
    if len(set(chosen)) < len(chosen):
        raise DataError(f"--domains must name each domain once, got {', '.join(chosen)}")
    return chosen


def is_image(name: str) -> bool:
    """True if a file's name is that of an image."""
    return name.lower().endswith(SUFFIXES) and not PurePosixPath(name).name.startswith(".")


def images_in_class_folders(files: Mapping[str, str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """The classes (sorted) and the images, path ``class/file`` -> full name, of files laid out in class folders.

    Raises:
        DataError: No image is laid out so.
    """
    images = {path: name for path, name in files.items() if is_image(path) and path.count("/") == 1}
    if not images:
        raise DataError("the source holds no images in class folders (class/image.jpg): a wrong or incomplete archive")
    return tuple(sorted({path.split("/")[0] for path in images})), images


def labelled(classes: Iterable[str], images: Mapping[str, str]) -> tuple[Entry, ...]:
    """Entries in the order of their paths ``class/file``, so that the order of files on disk does not count."""
    label = {name: index for index, name in enumerate(classes)}
    return tuple(Entry(images[path], label[path.split("/")[0]]) for path in sorted(images))


def seeded_split(labels: np.ndarray, test_share: float, seed: int) -> np.ndarray:
    """Which images are test images (bool): ``test_share`` of all and, within one image, of every class."""
    random = np.random.default_rng(seed)
    # Each class's images in random order, at even steps from 0 to 1; all classes' steps interleaved.
    steps = np.empty(len(labels))
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        steps[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    test = np.argsort(steps, kind="stable")[: round(test_share * len(labels))]
    return np.isin(np.arange(len(labels)), test)


def read_list(content: str, path: str) -> list[list[str]]:
    """The non-empty lines of a list file, each cut at blanks.

    Raises:
        DataError: There are none.
    """
    lines = [line.split() for line in content.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{path} is empty")
    return lines


def number(word: str) -> int | None:
    """A label or an index in a list file: some ASCII digits; None for anything else."""
    return int(word) if re.fullmatch(r"[0-9]{1,9}", word) else None


def readable(class_folder: str) -> str:
    """``001.Black_footed_Albatross`` -> ``Black footed Albatross``."""
    return re.sub(r"^\d+\.", "", class_folder).replace("_", " ")
