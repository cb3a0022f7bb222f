"""Stanford Cars (Krause et al. 2013): 196 makes, models and years; archives of images, annotations in MATLAB's files.

The authors' page is gone; copies keep its files. The devkit's annotations of test images have no labels: those are in
``cars_test_annos_withlabels.mat``.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from inflora.data.archives import FolderTree, JoinedTree, Opened, Tree, by_path, find, folder_origin, open_tree
from inflora.data.errors import DataError, brief
from inflora.data.matlab import variables
from inflora.data.source import Entry, Files, Options, Source, is_image

OFFICIAL = {"classes": 196, "train": 8_144, "test": 8_041}
ARCHIVES = ("cars_train.tgz", "cars_test.tgz", "car_devkit.tgz")


def read(source: Path, options: Options, scratch: Path) -> Source:
    """A folder with the three archives (or what they unpack to) and ``cars_test_annos_withlabels.mat``.

    Raises:
        DataError: A file is missing or no MATLAB file, or a listed image is not there.
    """
    tree, origin = _opened(source, scratch)
    names = tuple(str(name) for name in _variable(tree, "cars_meta.mat", "class_names"))
    train = _listed(tree, "cars_train_annos.mat", "cars_train", len(names))
    test = _listed(tree, "cars_test_annos_withlabels.mat", "cars_test", len(names))
    return Source(origin, names, {"train": train, "test": test}, official=OFFICIAL)


def _opened(source: Path, scratch: Path) -> Opened:
    """The files of the archives and those beside them, as one tree."""
    packed = [source / name for name in ARCHIVES if (source / name).is_file()]
    if not packed:
        return open_tree(source, scratch)
    beside = FolderTree(source)
    trees, origins = zip(*(open_tree(archive, scratch) for archive in packed), strict=True)
    return Opened(JoinedTree([beside, *trees]), ", ".join([*origins, folder_origin(source, beside)]))


def _listed(tree: Tree, file: str, folder: str, classes: int) -> Files:
    """The images of a folder that a file of annotations lists, with their labels (there from 1)."""
    in_folder = {name: PurePosixPath(name) for name in tree.names if is_image(name)}
    images = by_path({name: path.name for name, path in in_folder.items() if path.parent.name == folder})
    labels: dict[str, int] = {}
    for row in _variable(tree, file, "annotations"):
        try:
            image, label = str(row["fname"]), int(row["class"][0])
        except (LookupError, TypeError, ValueError, OverflowError):
            raise DataError(f"{file} has annotations without fname and class: a wrong or damaged file") from None
        if image not in images:
            raise DataError(f"{file} lists {image}, which is not in {folder}/: an incomplete source")
        if not 1 <= label <= classes or image in labels:
            raise DataError(f"{file} puts {image} into class {label} of {classes}, or lists it twice")
        labels[image] = label
    return Files(tree, tuple(Entry(images[image], labels[image] - 1) for image in sorted(labels)))


def _variable(tree: Tree, file: str, name: str) -> Sequence[Any]:
    """A variable of one of the MATLAB files, as a list of its elements."""
    content = tree.read(find(tree, file))
    try:
        found = variables(content)[name]
    except (KeyError, ValueError) as error:
        raise DataError(f"{file} is no MATLAB file with {name}, or a damaged one ({brief(error)})") from None
    if not isinstance(found, list):
        raise DataError(f"{file} has no list {name}: a wrong file")
    return found
