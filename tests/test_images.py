"""The one reader of images: which pixels it gives, and what it refuses."""

import importlib
import io
import os
import struct
import subprocess
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, ExifTags, Image

from inflora.data import images, prepare_store
from inflora.data.errors import DataError
from inflora.data.image_folder import read as read_image_folder
from inflora.data.images import FORMATS, as_rgb, decoded, read_image
from inflora.data.source import Dataset, Options
from inflora.data.store import open_split

LOSSLESS = [name for name in FORMATS if name not in ("JPEG", "GIF")]
every_format = pytest.mark.parametrize("name", FORMATS)


def saved(image: Image.Image, name: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **({"lossless": True} if name == "WEBP" else {}) | options)
    return buffer.getvalue()


def picture(size: tuple[int, int] = (12, 8)) -> Image.Image:
    """No two of its corners are alike."""
    y, x = np.mgrid[: size[1], : size[0]]
    return Image.fromarray(np.stack([20 * x, 30 * y, 250 - 10 * (x + y)], -1).astype(np.uint8))


def png(depth: int, colour: int, rows: bytes, width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    image_data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + image_data + chunk(b"IEND", b"")


# Pixels.


@pytest.mark.parametrize("name", LOSSLESS)
def test_an_image_is_given_back_as_it_was_saved(name):
    assert np.array_equal(decoded(saved(picture(), name), "it"), picture())


def sixteen_bits(name: str) -> bytes:
    values = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    if name == "rgb png":
        rows = b"".join(b"\0" + np.repeat(row[:, None], 3, 1).astype(">u2").tobytes() for row in values)
        return png(16, 2, rows, 16, 16)
    if name == "big-endian tiff":
        return saved(Image.fromarray(values.astype(">u2")), "TIFF")
    if name == "pgm of 10 bits":
        return b"P5 16 16 1020\n" + (values // 257 * 4).astype(">u2").tobytes()
    return saved(Image.fromarray(values), name)


@pytest.mark.parametrize("name", ["PNG", "TIFF", "PPM", "rgb png", "big-endian tiff", "pgm of 10 bits"])
def test_sixteen_bits_become_the_eight_that_they_came_from(name):
    """Pillow's own conversion shows all but the darkest as white."""
    shown = np.asarray(decoded(sixteen_bits(name), "it"))
    assert np.array_equal(shown[..., 0], np.arange(256).reshape(16, 16))
    assert (shown == shown[..., :1]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_turned_photograph_is_read_upright(name, orientation):
    upright, turned_back = picture((32, 16)), {6: 90, 8: 270, 3: 180}
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    if orientation in turned_back:
        lying = upright.rotate(turned_back[orientation], expand=True)
    else:  # mirrored: what undoes these undoes itself
        flip = {2: 0, 4: 1, 5: 5, 7: 6}.get(orientation)
        lying = upright if flip is None else upright.transpose(Image.Transpose(flip))
    options = {"quality": 95, "subsampling": 0} if name == "JPEG" else {}
    read = decoded(saved(lying, name, exif=exif, **options), "it")
    assert read.size == upright.size
    assert np.abs(np.asarray(read).astype(int) - np.asarray(upright)).mean() < (4 if name == "JPEG" else 0.1)
    with Image.open(io.BytesIO(saved(lying, name, exif=exif, **options))) as opened:
        assert np.array_equal(as_rgb(opened), read)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "1", "L", "CMYK"])
def test_other_modes_are_shown_in_rgb_and_transparency_is_dropped(mode):
    image = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    image = image.convert("RGB" if mode == "CMYK" else "RGBA").convert(mode)
    if mode == "P":
        image.info["transparency"] = bytes([0, 7])
    with warnings.catch_warnings(record=True) as warned:
        shown = np.asarray(decoded(saved(image, "TIFF" if mode == "CMYK" else "PNG"), "it"))
    assert shown.tolist() == [[[255] * 3, [0] * 3]]
    assert not warned


def test_a_store_of_turned_and_deep_images_gives_them_upright_and_with_their_greys(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "0.png").write_bytes(sixteen_bits("PNG"))
        (tmp_path / split / "a" / "1.jpg").write_bytes(saved(picture((32, 16)), "JPEG", exif=exif))
    for shorter_side in (None, 16):
        root = str(tmp_path / f"root{shorter_side}")
        dataset = Dataset(read_image_folder, "")
        folder = prepare_store("mine", dataset, tmp_path, Options(), root, shorter_side)
        pixels = open_split(folder, "train").pixels
        assert np.array_equal(pixels.array(0)[..., 0], np.arange(256).reshape(16, 16))
        assert pixels.array(1).shape == (32, 16, 3)


# What is refused.

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n9 9 scale\nshowpage\n%%EOF\n"
OTHER_FORMATS = {
    "xbm": b"#define a_width 8\n#define a_height 1\nstatic char a_bits[] = {0x00};",
    "xpm": b'/* XPM */\nstatic char *a[] = {"1 1 1 1", "a c #000000", "a"};',
    "sgi": b"\x01\xda" + bytes(510),
    "qoi": b"qoif" + bytes(20),
    "gbr": struct.pack(">5I", 28, 2, 1, 1, 1) + b"GIMP" + bytes(4),
    "tga": b"\0\0\2" + bytes(9) + struct.pack("<HHBB", 1, 1, 24, 0) + bytes(3),
    "fits": b"SIMPLE  =                    T" + bytes(2880),
    "eps": EPS,
    "nothing": b"",
    "text": b"no image",
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_other_formats_are_refused_and_no_program_is_started(name, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **_: started.append(args))
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **_: started.append(args))
    (tmp_path / "a.jpg").write_bytes(OTHER_FORMATS[name])
    with pytest.raises(DataError, match=r"a\.jpg is not an image of a known format \(JPEG, PNG"):
        read_image(tmp_path / "a.jpg")
    assert not started


@every_format
def test_a_cut_off_image_is_refused(name):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    content = saved(noise, name)
    for share in (0.2, 0.5, 0.9):
        with pytest.raises(DataError, match=r"^(image )?it is "):
            decoded(content[: int(share * len(content))], "it")


def test_an_image_larger_than_memory_likes_is_refused_in_one_line():
    huge = [png(8, 0, b"", side, side) for side in (10_000, 20_000)]  # Pillow warns of the first, refuses the second
    with warnings.catch_warnings(record=True) as warned:
        importlib.reload(images)  # pytest has put filters of its own before those of the module
        for content in huge:
            with pytest.raises(DataError, match="too large"):
                images.decoded(content, "it")
    assert not warned


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_numbers_without_a_known_white_are_refused(kind):
    with pytest.raises(DataError, match="save it with 8 or 16 bits"):
        decoded(saved(Image.fromarray(np.full((2, 2), 200, kind)), "TIFF"), "it")


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for path, says in (
        (tmp_path / "pipe.png", "it is a named pipe, expected a file"),
        (tmp_path / "folder.png", "it is a folder, expected a file"),
        (Path("/dev/zero"), "it is a device, expected a file"),
        (tmp_path / "none.png", "No such file or directory"),
        (tmp_path / ("x" * 5000), "File name too long"),
    ):
        with pytest.raises(DataError, match=says) as refused:
            read_image(path)
        assert len(str(refused.value)) < 1000


def test_a_name_that_is_no_text_or_of_several_lines_is_said_on_one(tmp_path):
    for name in ("caf\udce9.png", "a\nb.png"):
        (tmp_path / name).write_bytes(b"no image")
        with pytest.raises(DataError) as refused:
            read_image(tmp_path / name)
        assert str(refused.value).isprintable()
