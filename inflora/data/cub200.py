"""CUB-200-2011 (Wah et al. 2011): 200 species of birds; ``CUB_200_2011.tgz`` with its split in list files."""

from pathlib import Path

from inflora.data.archives import Tree, below, find, open_tree, text
from inflora.data.source import Entry, Files, Options, Source, read_list, readable
from inflora.data.store import DataError

OFFICIAL = {"classes": 200, "train": 5_994, "test": 5_794}


def read(source: Path, options: Options, scratch: Path) -> Source:
    """``CUB_200_2011.tgz`` or the folder it unpacks to.

    Raises:
        DataError: A list is missing or short, or an image is not there.
    """
    tree, origin = open_tree(source, scratch)
    paths = _table(tree, "images.txt")
    labels = _table(tree, "image_class_labels.txt")
    is_train = _table(tree, "train_test_split.txt")
    classes = {int(number): readable(name) for number, name in _table(tree, "classes.txt").items()}
    if sorted(classes) != list(range(1, len(classes) + 1)):
        raise DataError(f"classes.txt must number its classes 1 to {len(classes)}: a short list file")
    for name, table in (("image_class_labels.txt", labels), ("train_test_split.txt", is_train)):
        if missing := sorted(paths.keys() - table.keys()):
            raise DataError(
                f"{name} says nothing of image {missing[0]} and {len(missing) - 1} others: a short list file"
            )
    images = below(tree, "images")
    if absent := [path for path in paths.values() if path not in images]:
        raise DataError(f"{len(absent)} images of images.txt are not in the archive: {absent[0]} ...")
    if bad := [number for number in paths if is_train[number] not in ("0", "1")]:
        raise DataError(f"train_test_split.txt says {is_train[bad[0]]!r} of image {bad[0]}, expected 0 or 1")
    if bad := [number for number in paths if labels[number] not in map(str, classes)]:
        raise DataError(f"image_class_labels.txt puts image {bad[0]} into class {labels[bad[0]]} of {len(classes)}")

    def part(flag: str) -> Files:
        chosen = sorted((path, number) for number, path in paths.items() if is_train[number] == flag)
        return Files(tree, tuple(Entry(images[path], int(labels[number]) - 1) for path, number in chosen))

    names = tuple(classes[number] for number in sorted(classes))
    return Source(origin, names, {"train": part("1"), "test": part("0")}, official=OFFICIAL)


def _table(tree: Tree, file: str) -> dict[str, str]:
    """A list of ``number value`` lines."""
    lines = read_list(text(tree.read(find(tree, file)), file), file)
    if bad := next((line for line in lines if len(line) != 2 or not line[0].isdigit()), None):
        raise DataError(f"{file}: expected lines of `number value`, got {' '.join(bad)!r}")
    return {line[0]: line[1] for line in lines}
