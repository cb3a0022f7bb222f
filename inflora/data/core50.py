"""CORe50 (Lomonaco and Maltoni 2017): 50 objects, filmed in eleven sessions; ``core50_128x128.zip``.

Sessions s3, s7 and s10 are the test images of all its protocols: no domain is tested on images of its own.
New instances (NI) is ``data.scenario=domain``: eight tasks, in the order of ``--domains`` or shuffled by
``data.order_seed``. New classes (NC) is ``data.tasks=B10-Inc5``. The object and the session are in an image's path, so
the pickled lists beside the zip are not needed; NIC, whose batches only these lists name, is not here.
"""

import re
from pathlib import Path, PurePosixPath

from inflora.data.archives import by_path, open_tree
from inflora.data.errors import DataError
from inflora.data.manifest import Split
from inflora.data.source import Entry, Files, Options, Source, chosen_domains, is_image

TEST_SESSIONS = ("s3", "s7", "s10")
SESSIONS = tuple(f"s{number}" for number in range(1, 12) if f"s{number}" not in TEST_SESSIONS)
OFFICIAL = {"classes": 50, "train": 119_894, "test": 44_972}
# Five objects of each kind: o1 to o5 are plug adapters, o6 to o10 mobile phones, ...
KINDS = (
    *("plug adapter", "mobile phone", "scissors", "light bulb", "can"),
    *("glass", "ball", "marker", "cup", "remote control"),
)
_PATH = re.compile(r"s[0-9]{1,2}/o(?:[1-9]|[1-4][0-9]|50)/[^/]+")


def read(source: Path, options: Options, scratch: Path) -> Source:
    """``core50_128x128.zip`` or the folder in it: ``s<session>/o<object>/C_*.png``.

    Raises:
        DataError: A session has no images.
    """
    sessions = chosen_domains(options, SESSIONS)
    tree, origin = open_tree(source, scratch)
    in_folders = {name: "/".join(PurePosixPath(name).parts[-3:]) for name in tree.names if is_image(name)}
    images = by_path({name: path for name, path in in_folders.items() if _PATH.fullmatch(path)})
    placed = {path: path.split("/")[:2] for path in sorted(images)}
    objects = sorted({thing for _, thing in placed.values()}, key=lambda name: int(name[1:]))
    label_of = {thing: label for label, thing in enumerate(objects)}
    if absent := [name for name in (*sessions, *TEST_SESSIONS) if all(name != there for there, _ in placed.values())]:
        raise DataError(f"the source holds no images {absent[0]}/o<object>/*: a wrong or incomplete archive")

    def part(chosen: tuple[str, ...]) -> Files:
        own = [(path, session, thing) for path, (session, thing) in placed.items() if session in chosen]
        return Files(tree, tuple(Entry(images[path], label_of[thing], chosen.index(at)) for path, at, thing in own))

    splits: dict[Split, Files] = {"train": part(sessions), "test": part(TEST_SESSIONS)}
    numbers = [int(thing[1:]) - 1 for thing in objects]
    names = tuple(f"{KINDS[number // 5]} {number % 5 + 1}" for number in numbers)
    official = OFFICIAL if set(sessions) == set(SESSIONS) else {"classes": OFFICIAL["classes"]}
    return Source(origin, names, splits, sessions, official, test_domains=TEST_SESSIONS)
