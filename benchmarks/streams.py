"""Generated streams of tasks for benchmarks: always the same images, drawn when they are first needed."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from inflora.config import AugmentSettings, DataSettings, OptimSettings
from inflora.data import DATASETS, prepare_store
from inflora.data.source import Arrays, Dataset, Options, Source
from inflora.data.store import Split

SIDE, FINE = 32, 4
UNSTEADY = 0.06


def generated(
    classes: int, train: int, test: int, kinds_of: Callable[[int, np.random.Generator], np.ndarray], drawn: Callable
) -> Dataset:
    """A dataset of so many classes and images of each: ``drawn`` draws one image of a class of ``kinds_of``."""

    def read(source: Path, options: Options, scratch: Path) -> Source:
        random = np.random.default_rng(0)
        kinds = kinds_of(classes, random)

        def split(per_class: int) -> Arrays:
            images = [drawn(kinds[label], random) for label in range(classes) for _ in range(per_class)]
            return Arrays(np.stack(images), np.repeat(np.arange(classes), per_class))

        splits: dict[Split, Arrays] = {"train": split(train), "test": split(test)}
        return Source("generated", tuple(f"class {label}" for label in range(classes)), splits)

    return Dataset(read, needs=None)


# Strokes of a pen. A class is a pair of curves; every image draws them anew with an unsteady hand.


def curves(classes: int, random: np.random.Generator) -> np.ndarray:
    """The control points of each class's curves (classes x 2 x 3 x 2, in [0, 1])."""
    return random.uniform(0.15, 0.85, (classes, 2, 3, 2))


def stroke(kind: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One image (H, W, 1) uint8 of a class, given its curves' control points."""
    moved = kind + random.normal(0, UNSTEADY, kind.shape)
    centred = (moved - 0.5) * random.uniform(0.8, 1.1) + 0.5 + random.normal(0, 0.04, 2)
    t = np.linspace(0, 1, 20)[:, None]
    canvas = Image.new("L", (SIDE * FINE, SIDE * FINE))
    pen, width = ImageDraw.Draw(canvas), int(random.integers(8, 17))
    for start, middle, end in centred * SIDE * FINE:
        points = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end
        pen.line([tuple(point) for point in points], fill=255, width=width, joint="curve")
    pixels = np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=float)
    return (pixels + random.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8)[..., None]


# Woven cloth. A class is three waves; every image has them at phases of its own, a little turned and stretched, uneven
# and noisy. The backbone knows glyphs on plain ground: what tells weaves apart it has to learn.


def weaves(classes: int, random: np.random.Generator) -> np.ndarray:
    """Each class's wave vectors (classes x 3 x 2), in waves per image."""
    angle, number = random.uniform(0, np.pi, (classes, 3)), random.uniform(3, 9, (classes, 3))
    return np.stack([number * np.cos(angle), number * np.sin(angle)], -1)


def cloth(kind: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One image (H, W, 1) uint8 of a class, given its wave vectors."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE

    def wave(vector: np.ndarray) -> np.ndarray:
        return np.cos(2 * np.pi * (vector[0] * x + vector[1] * y) + random.uniform(0, 2 * np.pi))

    turn = random.normal(0, 0.06)
    turned = kind @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) * random.uniform(0.93, 1.07)
    threads = sum(random.uniform(0.6, 1) * wave(vector) for vector in turned)
    angle = random.uniform(0, 2 * np.pi)
    light = 30 * wave(random.uniform(0.5, 1.5) * np.array([np.cos(angle), np.sin(angle)]))
    pixels = 128 + random.uniform(25, 40) * threads + light + random.normal(0, 20, (SIDE, SIDE))
    return pixels.clip(0, 255).astype(np.uint8)[..., None]


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
            generated(20, 40, 30, curves, stroke),
            10,
            6,
        ),
        (
            "woven",
            "Generated: 24 classes of cloth, each of three waves, unevenly lit and noisy.",
            generated(24, 60, 40, weaves, cloth),
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
