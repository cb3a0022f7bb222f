"""CUB-200-2011 (Wah et al. 2011): 200 species of birds; ``CUB_200_2011.tgz`` with its split in list files."""

from pathlib import Path

from inflora.data.archives import Tree, below, find, open_tree, text
from inflora.data.errors import DataError
from inflora.data.source import Entry, Files, Options, Source, number, read_list, readable

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
    classes = {index: readable(name) for index, name in _table(tree, "classes.txt").items()}
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
    if bad := [index for index in paths if is_train[index] not in ("0", "1")]:
        raise DataError(f"train_test_split.txt says {is_train[bad[0]]!r} of image {bad[0]}, expected 0 or 1")
    class_of = {index: number(labels[index]) for index in paths}
    if bad := [index for index in paths if class_of[index] not in classes]:
        raise DataError(f"image_class_labels.txt puts image {bad[0]} into class {labels[bad[0]]} of {len(classes)}")

    def part(flag: str) -> Files:
        chosen = sorted((path, class_of[index] or 0) for index, path in paths.items() if is_train[index] == flag)
        return Files(tree, tuple(Entry(images[path], label - 1) for path, label in chosen))

    names = tuple(classes[index] for index in sorted(classes))
    return Source(origin, names, {"train": part("1"), "test": part("0")}, official=OFFICIAL)


def _table(tree: Tree, file: str) -> dict[int, str]:
    """A list of ``number value`` lines."""
    lines = read_list(text(tree.read(find(tree, file)), file), file)
    table: dict[int, str] = {}
    for line in lines:
        index = number(line[0])
        if len(line) != 2 or index is None or index in table:
            raise DataError(f"{file}: expected lines of `number value`, each number once, got {' '.join(line)!r}")
        table[index] = line[1]
    return table
