"""One reader of images: a short list of formats, upright, 8 bits a channel, RGB, of a bounded size."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from inflora.data.errors import DataError, brief
from inflora.data.files import read_file

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""All that is opened, whatever a file is called: Pillow knows formats that start other programs (EPS)."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Endings of the names of image files."""
MOST_PIXELS = 89_478_485
"""A quarter of a gigabyte in memory; where Pillow begins to warn of files that are small and their images huge."""

_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that undoes each of EXIF's orientations."""

# Pillow's warnings are of sizes (refused here) and of metadata that nothing here depends on. Filters of the program's
# own come first; a filter for these calls alone would be one for all threads, too.
warnings.filterwarnings("ignore", module=r"PIL\.", append=True)


def read_image(path: Path) -> Image.Image:
    """An image file in RGB.

    Raises:
        DataError: As ``decoded``; or it is no regular file.
    """
    return decoded(read_file(path), str(path))


def decoded(content: Any, name: str) -> Image.Image:
    """The bytes of an image file in RGB; of an animation the first picture.

    Raises:
        DataError: They are of no format that is known, damaged, or too large an image.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as file:
            if file.width * file.height > MOST_PIXELS:
                raise DataError(f"it has {file.width} x {file.height} pixels, at most {MOST_PIXELS:,} are read")
            return as_rgb(file)
    except Image.UnidentifiedImageError:
        raise DataError(f"{name} is not an image of a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        raise DataError(f"image {name} is damaged or too large ({brief(error)})") from None


def as_rgb(image: Image.Image) -> Image.Image:
    """An opened image in RGB, upright and with 8 bits a channel, by which 16 are divided as everywhere (/ 256).

    Transparency is dropped and the colours beneath it shown, as by the loaders of published results.

    Raises:
        DataError: Its numbers have no known white, or no conversion to RGB is known.
    """
    try:
        image.load()  # a TIFF is turned as it is loaded, and then no longer says that it should be
        turn = _TURNED.get(_orientation(image))
        if image.mode.startswith("I"):
            image = _eight_bits(image)
        elif image.mode == "F":
            raise DataError("its pixels are floating-point numbers; save it with 8 or 16 bits")
        elif image.mode == "P":
            image = image.convert("RGBA")  # Pillow does not go from a transparent palette to RGB without a word
        rgb = image.convert("RGB")
    except (ValueError, OSError) as error:
        raise DataError(f"the image cannot be read as RGB: {brief(error)}") from None
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # metadata that cannot be read says nothing: viewers show such a file as it is, too
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """From 16 bits; "I" has 32, of which Pillow's readers of PNG and PPM use 16."""
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise DataError("its pixels are 32-bit or signed integers; save it with 8 or 16 bits")
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
