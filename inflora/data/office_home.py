"""Office-Home (Venkateswara et al. 2017): 65 classes in four domains, ``<domain>/<class>/*``; no official split.

A fifth of every class of every domain becomes test images, drawn by ``--split-seed``; papers draw their own, too.
"""

from pathlib import Path, PurePosixPath

import numpy as np

from inflora.data.archives import by_path, open_tree
from inflora.data.errors import DataError
from inflora.data.source import Entry, Files, Options, Source, chosen_domains, is_image, readable, seeded_split

DOMAINS = ("Art", "Clipart", "Product", "Real World")
CLASSES, IMAGES = 65, 15_588
TEST_SHARE = 0.2


def read(source: Path, options: Options, scratch: Path) -> Source:
    """``OfficeHomeDataset_10072016.zip`` or the folder in it.

    Raises:
        DataError: A domain has no images.
    """
    domains = chosen_domains(options, DOMAINS)
    tree, origin = open_tree(source, scratch)
    parts = {name: PurePosixPath(name).parts[-3:] for name in tree.names if is_image(name)}
    # Copies write Real_World or RealWorld: a folder's name cannot have a blank everywhere.
    spelt = {domain.replace(" ", blank): domain for domain in DOMAINS for blank in (" ", "_", "")}
    placed = {name: (spelt.get(path[0], ""), *path[1:]) for name, path in parts.items() if len(path) == 3}
    images = by_path({name: "/".join(path) for name, path in placed.items() if path[0] in domains})
    paths = sorted(images)
    if absent := [domain for domain in domains if not any(path.startswith(f"{domain}/") for path in paths)]:
        raise DataError(f"the source holds no images {absent[0]}/<class>/*: a wrong or incomplete archive")
    folders = sorted({path.split("/")[1] for path in paths})
    label_of = {folder: label for label, folder in enumerate(folders)}
    entries = [Entry(images[path], label_of[path.split("/")[1]], domains.index(path.split("/")[0])) for path in paths]
    kinds = np.array([entry.domain * len(folders) + entry.label for entry in entries])
    is_test = seeded_split(kinds, TEST_SHARE, options.split_seed).tolist()
    splits = {
        split: Files(tree, tuple(entry for entry, test in zip(entries, is_test, strict=True) if test == tested))
        for split, tested in (("train", False), ("test", True))
    }
    official = {"classes": CLASSES}
    if set(domains) == set(DOMAINS):
        tests = round(TEST_SHARE * IMAGES)
        official |= {"train": IMAGES - tests, "test": tests}
    origin += f", test images drawn by seed {options.split_seed}"
    return Source(origin, tuple(map(readable, folders)), splits, domains, official, gaps=True)  # type: ignore[arg-type]
