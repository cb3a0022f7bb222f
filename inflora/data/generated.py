"""Generated images, always the same: streams that need no download, and on which adapting is worth little or much.

strokes: 20 classes of two bent strokes each, drawn with an unsteady hand; the shipped backbone nearly knows them.
woven: 24 classes of cloth, each of three waves, unevenly lit and noisy; what tells them apart it has to learn.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from inflora.data.manifest import Split
from inflora.data.source import Arrays, Dataset, Options, Source

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


def curves(classes: int, random: np.random.Generator) -> np.ndarray:
    """The control points of the two curves of each class's strokes (classes x 2 x 3 x 2, in [0, 1])."""
    return random.uniform(0.15, 0.85, (classes, 2, 3, 2))


def stroke(kind: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One image (H, W, 1) uint8 of a class, given its curves' control points: drawn anew with an unsteady hand."""
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


def weaves(classes: int, random: np.random.Generator) -> np.ndarray:
    """Each class's wave vectors (classes x 3 x 2), in waves per image."""
    angle, number = random.uniform(0, np.pi, (classes, 3)), random.uniform(3, 9, (classes, 3))
    return np.stack([number * np.cos(angle), number * np.sin(angle)], -1)


def cloth(kind: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One image (H, W, 1) uint8 of a class, given its wave vectors: at phases of its own, turned and stretched."""
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


STROKES, WOVEN = generated(20, 40, 30, curves, stroke), generated(24, 60, 40, weaves, cloth)
