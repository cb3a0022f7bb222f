"""ImageNet-R (Hendrycks et al. 2021a) and ImageNet-A (2021b): 200 WordNet-id folders each, no official split.

Two splits of ImageNet-R are in use: a published list of file names (``--test-list``), and a fifth drawn by a seed, as
the InfLoRA authors' code does (``--split-seed``; here the same share of every class, there of all images together).
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from inflora.config import YamlError, read_yaml
from inflora.data.archives import Tree, by_path, file_origin, open_tree, text
from inflora.data.errors import DataError
from inflora.data.files import read_file
from inflora.data.source import Files, Options, Source, images_in_class_folders, labelled, read_list, seeded_split

TEST_SHARE = 0.2
IMAGENET_R = {"classes": 200, "train": 24_000, "test": 6_000}
IMAGENET_A = {"classes": 200, "train": 6_000, "test": 1_500}
_WORDNET_ID = re.compile(r"^n[0-9]{8}$")


def read_r(source: Path, options: Options, scratch: Path) -> Source:
    """``imagenet-r.tar`` or the folder it unpacks to."""
    return _read(source, options, scratch, IMAGENET_R)


def read_a(source: Path, options: Options, scratch: Path) -> Source:
    """``imagenet-a.tar`` or the folder it unpacks to."""
    return _read(source, options, scratch, IMAGENET_A)


def _read(source: Path, options: Options, scratch: Path, official: dict[str, int]) -> Source:
    tree, origin = open_tree(source, scratch)
    if any("train" in PurePosixPath(name).parts[:-2] for name in tree.names):
        raise DataError(f"{source.name} is split into train/ and test/ already; prepare it with --format image_folder")
    in_folders = {name: "/".join(PurePosixPath(name).parts[-2:]) for name in tree.names}
    classes, images = images_in_class_folders(
        by_path({name: path for name, path in in_folders.items() if _WORDNET_ID.match(path.split("/")[0])})
    )
    paths = sorted(images)
    if options.test_list is not None:
        listed = _listed(options.test_list)
        if missing := sorted(listed - images.keys()):
            raise DataError(f"{options.test_list} names {len(missing)} files that are not there: {missing[0]} ...")
        is_test = [path in listed for path in paths]
        origin += f", test images by {file_origin(options.test_list)}"
    else:
        labels = np.array([path.split("/")[0] for path in paths])
        is_test = seeded_split(labels, TEST_SHARE, options.split_seed).tolist()
        origin += f", test images drawn by seed {options.split_seed}"

    def part(test: bool) -> Files:
        chosen = {path: images[path] for path, yes in zip(paths, is_test, strict=True) if yes == test}
        return Files(tree, labelled(classes, chosen))

    if options.test_list is not None:  # which and how many test images is the list's to say
        official = {"classes": official["classes"]}
    return Source(origin, _class_names(tree, classes), {"train": part(False), "test": part(True)}, official=official)


def _listed(path: Path) -> set[str]:
    """``class/file`` of every image in a list: a path per line, or YAML whose ``data`` is a list of paths."""
    content = text(read_file(path), str(path))
    if path.suffix in (".yaml", ".yml"):
        try:
            loaded: Any = read_yaml(content)
        except YamlError as error:
            raise DataError(f"--test-list {path} is not plain YAML: {error}") from None
        names = loaded.get("data") if isinstance(loaded, dict) else None
        if not names or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"--test-list {path} has no list `data` of file names")
    else:
        names = [line[0] for line in read_list(content, str(path))]
    return {"/".join(PurePosixPath(name).parts[-2:]) for name in names}


def _class_names(tree: Tree, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Words for the WordNet ids where the archive's README lists them; the ids themselves elsewhere."""
    readmes = [name for name in tree.names if PurePosixPath(name).name == "README.txt"]
    lines = tree.read(readmes[0]).decode(errors="replace").splitlines() if readmes else []
    words = dict(line.split(maxsplit=1) for line in lines if re.match(r"^n[0-9]{8}\s+\S", line))
    return tuple(words.get(wordnet_id, wordnet_id).strip() for wordnet_id in classes)
