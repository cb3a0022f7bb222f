"""Draw a small image folder, flowers/: six kinds of flowers by number and colour of petals, 24 images of each."""

import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

KINDS = {"daisy": (12, "white"), "poppy": (4, "red"), "violet": (5, "purple"), "lily": (6, "orange")}
KINDS |= {"bluebell": (5, "blue"), "buttercup": (5, "yellow")}


def flower(petals: int, colour: str, turn: float) -> Image.Image:
    """One flower on grass, turned by some radians."""
    image = Image.new("RGB", (48, 48), (40, 90 + int(40 * random.random()), 40))
    draw = ImageDraw.Draw(image)
    for petal in range(petals):
        angle = turn + 2 * math.pi * petal / petals
        x, y = 24 + 11 * math.cos(angle), 24 + 11 * math.sin(angle)
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=colour)
    draw.ellipse((19, 19, 29, 29), fill="gold")
    return image


if __name__ == "__main__":
    random.seed(0)
    for split in ("train", "test"):
        for kind, (petals, colour) in KINDS.items():
            folder = Path("flowers", split, kind)
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(12):
                flower(petals, colour, random.random()).save(folder / f"{number}.png")
