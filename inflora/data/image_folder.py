"""Any images laid out as ``train/<class>/*`` and ``test/<class>/*``: a folder, tar or zip."""

from pathlib import Path

from inflora.data.archives import below, legible, open_tree
from inflora.data.errors import DataError
from inflora.data.source import Files, Options, Source, images_in_class_folders, labelled


def read(source: Path, options: Options, scratch: Path) -> Source:
    """The classes are the folders' names, sorted; both splits must have the same ones.

    Raises:
        DataError: A split or a class is missing in one of them.
    """
    tree, origin = open_tree(source, scratch)
    (train_classes, train), (test_classes, test) = (
        images_in_class_folders(below(tree, split)) for split in ("train", "test")
    )
    if odd := sorted(set(train_classes) ^ set(test_classes)):
        where = "test" if odd[0] in test_classes else "train"
        raise DataError(f"class {odd[0]} is in {where}/ only; both train/ and test/ need every class")
    splits = {"train": Files(tree, labelled(train_classes, train)), "test": Files(tree, labelled(train_classes, test))}
    return Source(origin, tuple(map(legible, train_classes)), splits)  # type: ignore[arg-type]
