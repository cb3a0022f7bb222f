"""DomainNet (Peng et al. 2019): 345 classes in six domains; a zip and two list files (``path label``) each."""

from pathlib import Path, PurePosixPath

from inflora.data.archives import FolderTree, JoinedTree, Tree, ZipTree, file_origin, folder_origin, text
from inflora.data.errors import DataError
from inflora.data.files import read_file
from inflora.data.manifest import Split
from inflora.data.source import Entry, Files, Options, Source, chosen_domains, number, read_list, readable

CLASSES = 345
# Images of the official lists, training and test; clipart's are those that the six add up to 409,832 and 176,743 with.
IMAGES = {
    "clipart": (33_525, 14_604),
    "infograph": (36_023, 15_582),
    "painting": (50_416, 21_850),
    "quickdraw": (120_750, 51_750),
    "real": (120_906, 52_041),
    "sketch": (48_212, 20_916),
}
DOMAINS = tuple(IMAGES)


def read(source: Path, options: Options, scratch: Path) -> Source:
    """A folder with ``<domain>.zip`` (or the folder it unpacks to), ``<domain>_train.txt`` and ``<domain>_test.txt``.

    Raises:
        DataError: A domain, a list or a listed image is missing, or a label belongs to two classes.
    """
    domains = chosen_domains(options, DOMAINS)
    if not source.is_dir():
        raise DataError(f"--source {source} must be the folder with DomainNet's zips and list files")
    trees, origins = zip(*(_open_domain(source, domain) for domain in domains), strict=True)
    tree = JoinedTree(trees)
    names: tuple[Split, ...] = ("train", "test")
    listed = {split: [_listed(source, domain, split) for domain in domains] for split in names}
    class_of = _classes(listed["train"] + listed["test"])
    splits: dict[Split, Files] = {}
    for split in names:
        entries = tuple(
            Entry(path, label, index) for index, lines in enumerate(listed[split]) for path, label in sorted(lines)
        )
        if missing := [entry.name for entry in entries if entry.name not in tree.names]:
            raise DataError(f"{len(missing)} of the {split} lists' images are not there: {missing[0]} ...")
        splits[split] = Files(tree, entries)
    if len(class_of) <= max(class_of):
        absent = next(label for label in range(len(class_of)) if label not in class_of)
        raise DataError(f"no image of class {absent} is in the lists, but of class {max(class_of)}: a short list file")
    train, test = (sum(IMAGES[domain][part] for domain in domains) for part in (0, 1))
    official = {"classes": CLASSES, "train": train, "test": test}
    classes = tuple(class_of[label] for label in range(len(class_of)))
    return Source("; ".join(origins), classes, splits, domains, official, gaps=True)


def _open_domain(source: Path, domain: str) -> tuple[Tree, str]:
    archive, folder = source / f"{domain}.zip", source / domain
    lists = ", ".join(file_origin(_list_file(source, domain, split)) for split in ("train", "test"))
    if archive.is_file():
        return ZipTree(archive), f"{file_origin(archive)}, {lists}"
    if folder.is_dir():
        tree = FolderTree(folder)
        return _Prefixed(tree, domain), f"{folder_origin(folder, tree)}, {lists}"
    raise DataError(
        f"{source} holds neither {domain}.zip nor a folder {domain}; download it, or choose other --domains"
    )


def _list_file(source: Path, domain: str, split: str) -> Path:
    path = source / f"{domain}_{split}.txt"
    if not path.is_file():
        raise DataError(f"{path} is missing: the official list of {domain}'s {split} images")
    return path


def _listed(source: Path, domain: str, split: Split) -> list[tuple[str, int]]:
    path = _list_file(source, domain, split)
    listed = []
    for line in read_list(text(read_file(path), str(path)), str(path)):
        label = number(line[-1])
        if len(line) != 2 or label is None or len(PurePosixPath(line[0]).parts) < 2:
            raise DataError(f"{path}: expected lines of `domain/class/image label`, got {' '.join(line)!r}")
        listed.append((line[0], label))
    return listed


def _classes(lists: list[list[tuple[str, int]]]) -> dict[int, str]:
    """Label -> class name, from the folders of the listed images."""
    class_of: dict[int, str] = {}
    for path, label in (entry for lines in lists for entry in lines):
        name = readable(PurePosixPath(path).parts[-2])
        if class_of.setdefault(label, name) != name:
            raise DataError(f"label {label} is {class_of[label]} in one line of the lists and {name} in another")
    return class_of


class _Prefixed:
    """A tree whose names begin with a folder."""

    def __init__(self, tree: Tree, folder: str) -> None:
        self._tree, self._prefix = tree, f"{folder}/"
        self.names = frozenset(self._prefix + name for name in tree.names)

    def read(self, name: str) -> bytes:
        return self._tree.read(name.removeprefix(self._prefix))
