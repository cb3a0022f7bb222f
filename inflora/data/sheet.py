"""A contact sheet: some training images of every class beside its name, to see at a glance what a store holds."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from inflora.data.errors import DataError
from inflora.data.store import Images

_TILE, _PER_CLASS, _MOST_CLASSES = 48, 8, 40
_NAMES_WIDTH, _TEXT_HEIGHT, _LONGEST_NAME = 240, 14, 32
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def check_sheet(path: Path) -> None:
    """Raise DataError where no contact sheet can be written."""
    if path.suffix.lower() not in _SUFFIXES:
        raise DataError(f"--sheet must end in {', '.join(_SUFFIXES)}, got {str(path)!r}")
    if path.is_dir() or not path.parent.is_dir():
        raise DataError(f"--sheet {path} must be a file in a folder that is there")


def contact_sheet(images: Images, classes: Sequence[str]) -> Image.Image:
    """A row per class (evenly chosen if there are many): its name and its first images side by side."""
    shown = np.unique(np.linspace(0, len(classes) - 1, min(len(classes), _MOST_CLASSES)).astype(int)).tolist()
    sheet = Image.new("RGB", (_NAMES_WIDTH + _PER_CLASS * _TILE, len(shown) * _TILE))
    text, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT_HEIGHT)
    for place, label in enumerate(shown):
        middle = place * _TILE + _TILE // 2
        text.text((8, middle), _short(classes[label]), fill="white", font=font, anchor="lm")
        for column, row in enumerate((images.labels == label).nonzero()[:_PER_CLASS, 0].tolist()):
            pixels = images.pixels.array(row)
            image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
            tile = image.resize((_TILE, _TILE), Image.Resampling.BILINEAR)
            sheet.paste(tile, (_NAMES_WIDTH + column * _TILE, place * _TILE))
    return sheet


def _short(name: str) -> str:
    line = " ".join(name.split())
    return line if len(line) <= _LONGEST_NAME else f"{line[: _LONGEST_NAME - 3]}..."
