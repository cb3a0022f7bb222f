"""ObjectNet, OmniBenchmark and VTAB as class-incremental learning has them: parts of these, cut by APER and PILOT.

Zhou et al., IJCV 2024 (arXiv 2303.07338) drew 200, 300 and 50 classes and split them; their zips hold image folders,
``train/<class>/*`` and ``test/<class>/*``. Labels follow the folders' names as text, as in PILOT, and so do its class
orders. VTAB's folders 10 to 59 are ten classes each of RESISC45, DTD, Pets, EuroSAT and Flowers, learnt in this
order: not to be shuffled. How many images of ObjectNet there are was nowhere to be checked: none are expected here. Of
OmniBenchmark's test images two numbers are in print, 5,983 and 5,985: any is accepted.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from inflora.data import image_folder
from inflora.data.source import Options, Source

OBJECTNET = {"classes": 200}
OMNIBENCHMARK = {"classes": 300, "train": 89_697}
VTAB = {"classes": 50, "train": 1_796, "test": 8_619}


def reader(official: Mapping[str, int]) -> Callable[[Path, Options, Path], Source]:
    """What reads one of the zips, or the folder in it."""

    def read(source: Path, options: Options, scratch: Path) -> Source:
        return image_folder.read(source, options, scratch)._replace(official=official)

    return read
