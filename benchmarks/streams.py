"""Generated streams of tasks for benchmarks: always the same images, drawn when they are first needed."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from inflora.config import AugmentSettings, DataSettings, OptimSettings
from inflora.data import DATASETS, prepare_store
from inflora.data.generated import FINE, SIDE, curves, generated, stroke
from inflora.data.source import Dataset, Options

# Scanned letters. A class is a letter of Armenian or Georgian, which the backbone has never seen: it was trained on
# Latin, Greek and Cyrillic ones. Every image has it in one of eight fonts, a little turned, leaning and stretched, and
# is scanned with 8 x 8 pixels, as the digits are.

SCAN = 8
FONTS = [f"DejaVu{family}" for family in ("Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique")]
FONTS += [f"DejaVu{family}" for family in ("Serif", "Serif-Bold", "Serif-Italic", "Serif-BoldItalic")]


def letters(classes: int, random: np.random.Generator) -> np.ndarray:
    """The code point of each class's letter, in the order of code points."""
    points = [*range(0x531, 0x557), *range(0x561, 0x587), *range(0x10D0, 0x10F1)]
    return np.array(points[:classes])


@cache
def font(name: str) -> ImageFont.FreeTypeFont:
    """A font that matplotlib ships."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), 28 * FINE)


def letter(point: int, random: np.random.Generator) -> np.ndarray:
    """One image (H, W, 1) uint8 of a letter, given its code point."""
    side = SIDE * FINE
    canvas = Image.new("L", (side, side))
    chosen = font(FONTS[random.integers(len(FONTS))])
    ImageDraw.Draw(canvas).text((side / 2, side / 2), chr(point), fill=255, font=chosen, anchor="mm")
    turn, lean = random.normal(0, 0.07, 2)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = rotation @ np.array([[1, lean], [0, 1]]) @ np.diag(random.uniform(0.9, 1.15, 2))
    shift = side / 2 - matrix @ np.full(2, side / 2) + random.normal(0, 0.02, 2) * side
    affine = (*matrix[0], shift[0], *matrix[1], shift[1])
    moved = canvas.transform((side, side), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    scanned = moved.resize((SCAN, SCAN), Image.Resampling.BOX).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    pixels = np.asarray(scanned, dtype=float)
    return (pixels + random.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8)[..., None]


class Stream(NamedTuple):
    """A stream of tasks with the budget of a task, and where its images come from."""

    about: str
    data: DataSettings
    optim: OptimSettings
    images: Dataset


def _stream(name: str, about: str, images: Dataset, tasks: int, epochs: int) -> Stream:
    augment = AugmentSettings(scale=(0.8, 1.0), flip=False)
    data = DataSettings(dataset=name, tasks=tasks, order_seed=1993, validation=0.2, augment=augment)
    return Stream(about, data, OptimSettings(batch_size=16, head_init="zero", epochs=epochs), images)


STREAMS = {
    name: _stream(name, *rest)
    for name, *rest in (
        ("digits", "Real scans of ten digits.", DATASETS["digits"], 5, 4),
        (
            "strokes",
            "Generated: 20 classes of two bent strokes each, drawn with an unsteady hand.",
            DATASETS["strokes"],
            10,
            6,
        ),
        (
            "woven",
            "Generated: 24 classes of cloth, each of three waves, unevenly lit and noisy.",
            DATASETS["woven"],
            8,
            6,
        ),
        (
            "letters",
            "100 letters of Armenian and Georgian in eight fonts, turned, leaning, scanned with 8 x 8 pixels.",
            generated(100, 30, 20, letters, letter),
            50,
            5,
        ),
        ("many_strokes", "As strokes, of 100 classes.", generated(100, 20, 10, curves, stroke), 50, 5),
    )
}


def prepare(name: str, root: Path) -> None:
    """Write a stream's store below ``root``, unless it is there."""
    if not (root / name).exists():
        prepare_store(name, STREAMS[name].images, Path(), Options(), str(root))
