"""A contact sheet: some training images of every class, to see at a glance what a store holds."""

import numpy as np
from PIL import Image

from inflora.data.store import Images

_TILE, _PER_CLASS, _MOST_CLASSES = 48, 8, 40


def contact_sheet(images: Images, classes: int) -> Image.Image:
    """A row per class (evenly chosen if there are many), its first images side by side."""
    shown = np.unique(np.linspace(0, classes - 1, min(classes, _MOST_CLASSES)).astype(int)).tolist()
    sheet = Image.new("RGB", (_PER_CLASS * _TILE, len(shown) * _TILE))
    for place, label in enumerate(shown):
        for column, row in enumerate((images.labels == label).nonzero()[:_PER_CLASS, 0].tolist()):
            pixels = images.pixels.array(row)
            image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
            sheet.paste(image.resize((_TILE, _TILE), Image.Resampling.BILINEAR), (column * _TILE, place * _TILE))
    return sheet
