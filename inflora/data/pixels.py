"""From stored pixels to views: the boxes of some images, resized to the model's input.

Shapes: N images of a split, B of a batch, C channels, H x W stored image, S side of the model's input.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from inflora.data.augment import Crops, crop_and_resize
from inflora.data.errors import DataError
from inflora.data.images import decoded
from inflora.data.manifest import damaged
from inflora.data.staging import Pending, Resident, Staged, host_memory, to_device


class Views(NamedTuple):
    """Some images (B) of a split, and the box of each that is wanted."""

    rows: Tensor
    crops: Crops

    def to(self, device: torch.device) -> "Views":
        """The same on ``device``, without the host waiting for it."""
        boxes, flip = (to_device(part, device) for part in (self.crops.boxes, self.crops.flip))
        return Views(to_device(self.rows, device), Crops(boxes, flip, self.crops.cut))

    @classmethod
    def joined(cls, parts: Sequence["Views"]) -> "Views":
        """The views of all parts, in order; ``split`` takes them apart again."""
        rows, boxes, flip = (
            torch.cat(each) for each in zip(*((v.rows, v.crops.boxes, v.crops.flip) for v in parts), strict=True)
        )
        return cls(rows, Crops(boxes, flip, parts[0].crops.cut))

    def split(self, sizes: Sequence[int]) -> list["Views"]:
        """Parts of so many images each."""
        parts = (part.split(list(sizes)) for part in (self.rows, self.crops.boxes, self.crops.flip))
        return [Views(rows, Crops(boxes, flip, self.crops.cut)) for rows, boxes, flip in zip(*parts, strict=True)]


class Pixels(Protocol):
    """The images of one split."""

    def __len__(self) -> int: ...

    def sizes(self, rows: Tensor) -> Tensor:
        """Height and width (B, 2) of some images."""
        ...

    def start(self, views: Views, there: Views, side: int) -> Pending:
        """Begin to make some views on the device where ``there``, the same views, is; ``views`` is on the host."""
        ...

    def resident_on(self, device: torch.device) -> "Pixels":
        """The same images, kept on the device if they fit there easily."""
        ...

    def array(self, row: int) -> np.ndarray:
        """One whole image (H, W, C) uint8."""
        ...


_LARGE_BATCH = 256  # as many images as evaluation looks at together
_SHARE = 8  # an eighth of a device's memory, whatever is free of it: a run that goes on makes the views it made


class RawPixels:
    """Images of one size as one uint8 tensor (N, H, W, C): in memory-mapped host memory or on the device."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @classmethod
    def mapped(cls, column: Any, height: int, width: int, channels: int) -> "RawPixels":
        """The mapping of an Arrow column of fixed-size binaries, not a copy."""
        shape = (len(column), height, width, channels)
        pixels = np.frombuffer(column.buffers()[1], dtype=np.uint8, count=int(np.prod(shape)))
        with warnings.catch_warnings():
            # The mapping is read-only and torch has no such tensors; nothing here writes to one.
            warnings.filterwarnings("ignore", message=".*not writable.*")
            return cls(torch.from_numpy(pixels.reshape(shape)))

    def __len__(self) -> int:
        return len(self.tensor)

    def sizes(self, rows: Tensor) -> Tensor:
        return torch.tensor(self.tensor.shape[1:3]).expand(len(rows), 2)

    def start(self, views: Views, there: Views, side: int) -> Pending:
        device = there.rows.device
        if device.type == "cpu":
            made = _pool().submit(lambda: crop_and_resize(self.tensor[views.rows], views.crops, side))
            return Staged([made], made.result, device)
        if self.tensor.device == device:
            return Resident(lambda: crop_and_resize(self.tensor[there.rows], there.crops, side))
        # Too large to stay: threads gather the batch into pinned memory, whole images, cropped on the device.
        gathered = host_memory((len(views.rows), *self.tensor.shape[1:]), device)
        work = _pool().submit(lambda: torch.index_select(self.tensor, 0, views.rows, out=gathered))
        return Staged([work], lambda: gathered, device, lambda pixels: crop_and_resize(pixels, there.crops, side))

    def resident_on(self, device: torch.device) -> "RawPixels":
        return RawPixels(self.tensor.to(device)) if _fits(self.tensor.nbytes, device) else self

    def array(self, row: int) -> np.ndarray:
        return self.tensor[row].cpu().numpy()


class FilePixels:
    """Images of any size, RGB, one entry each in Arrow columns: encoded files, or arrays decoded once.

    Decoding, cropping and resizing let go of Python's lock: a pool of threads does them for many images at a time.
    """

    def __init__(self, columns: Sequence[Any], sizes: Tensor, *, encoded: bool, store: Path | str) -> None:
        self._columns = columns
        self._store = store
        self._starts = np.cumsum([0, *map(len, columns)])
        self._sizes = sizes
        self._encoded = encoded

    def __len__(self) -> int:
        return len(self._sizes)

    def sizes(self, rows: Tensor) -> Tensor:
        return self._sizes[rows]

    def start(self, views: Views, there: Views, side: int) -> Pending:
        rows, crops = views
        pixels = host_memory((len(rows), side, side, 3), there.rows.device)
        places = pixels.numpy()

        def write(place: int, row: int, box: Sequence[float], mirrored: bool) -> None:
            places[place] = self._view(row, box, mirrored, crops.cut, side)

        chosen = zip(rows.tolist(), crops.boxes.tolist(), (crops.flip > 0).tolist(), strict=True)
        work = [_pool().submit(write, place, *view) for place, view in enumerate(chosen)]
        return Staged(work, lambda: pixels, there.rows.device, _as_images)

    def resident_on(self, device: torch.device) -> "Pixels":
        fits = _fits(BlockPixels.bytes_for(self._sizes), device)
        return BlockPixels(self._all(), self._sizes, device) if fits else self

    def _all(self) -> Iterator[np.ndarray]:
        """Every whole image, some hundred at a time: threads are faster than who takes them, and memory has an end."""
        for start in range(0, len(self), _LARGE_BATCH):
            yield from _pool().map(self.array, range(start, min(start + _LARGE_BATCH, len(self))))

    def array(self, row: int) -> np.ndarray:
        return np.asarray(self._image(row))

    def _image(self, row: int) -> Image.Image:
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        content = self._columns[shard][row - int(self._starts[shard])].as_buffer()
        height, width = self._sizes[row].tolist()
        if not self._encoded:
            return Image.frombuffer("RGB", (width, height), content)
        try:
            image = decoded(content, str(row))
        except DataError as error:
            raise damaged(self._store, str(error)) from None
        if image.size != (width, height):
            raise damaged(self._store, f"image {row} is not {width} x {height} as when it was stored")
        return image

    def _view(self, row: int, box: Sequence[float], mirrored: bool, cut: bool, side: int) -> np.ndarray:
        top, left, height, width = box
        image, edges = self._image(row), (left, top, left + width, top + height)
        if cut:
            image, edges = image.crop(edges), (0, 0, width, height)
        view = image.resize((side, side), Image.Resampling.BILINEAR, box=edges)
        return np.asarray(ImageOps.mirror(view) if mirrored else view)


class BlockPixels:
    """Images of any size, RGB, decoded once into one block of the device's memory, one after another.

    They are cropped and resized there, with the weights of Pillow's filter, without its roundings to whole numbers on
    the way: views differ by about one 255th from those that threads of the host make.
    """

    def __init__(self, images: Iterable[np.ndarray], sizes: Tensor, device: torch.device) -> None:
        areas = sizes.prod(1)
        self._sizes = sizes
        self._sizes_there = to_device(sizes, device)
        self._starts_there = to_device(areas.cumsum(0) - areas, device)
        self._block = torch.empty(int(areas.sum()), 3, dtype=torch.uint8, device=device)
        for image, block in zip(images, self._block.split(areas.tolist()), strict=True):
            # A block of its own for each image: the copy before may still be reading the last one.
            host = host_memory(block.shape, device)
            host.numpy()[:] = image.reshape(-1, 3)
            block.copy_(host, non_blocking=True)

    @staticmethod
    def bytes_for(sizes: Tensor) -> int:
        """The bytes that the images take, and a large batch of them on its way out of the block."""
        largest = int(sizes.amax(0).prod())
        places, pixels, floats = 2 * 8, 3, 2 * 3 * 4
        return 3 * int(sizes.prod(1).sum()) + _LARGE_BATCH * largest * (places + pixels + floats)

    def __len__(self) -> int:
        return len(self._sizes)

    def sizes(self, rows: Tensor) -> Tensor:
        return self._sizes[rows]

    def start(self, views: Views, there: Views, side: int) -> Pending:
        # Of a box that is cut out nothing beyond it is looked at; a window may look at all of its image.
        needed = views.crops.boxes[:, 2:].long() if views.crops.cut else self._sizes[views.rows]
        height, width = needed.amax(0).tolist() if len(needed) else (1, 1)
        return Resident(lambda: self._view(there, height, width, side))

    def _view(self, views: Views, height: int, width: int, side: int) -> Tensor:
        rows, crops = views
        corners, sizes = torch.zeros_like(crops.boxes[:, :2]), self._sizes_there[rows]
        if crops.cut:
            corners, sizes = crops.boxes.split(2, dim=1)
            crops = crops._replace(boxes=torch.cat([torch.zeros_like(corners), sizes], dim=1))
        return crop_and_resize(self._parts(rows, corners.long(), sizes.long(), height, width), crops, side, sizes)

    def _parts(self, rows: Tensor, corners: Tensor, sizes: Tensor, height: int, width: int) -> Tensor:
        """A part of each image (B, H, W, C), in the upper left corner; what is beyond it is any of its pixels."""
        across, down = (
            corner[:, None] + torch.arange(length, device=rows.device).minimum(size[:, None] - 1)
            for length, corner, size in zip((width, height), corners.T.flip(0), sizes.T.flip(0), strict=True)
        )
        whole_width = self._sizes_there[rows, 1, None, None]
        return self._block[self._starts_there[rows, None, None] + down[:, :, None] * whole_width + across[:, None, :]]

    def resident_on(self, device: torch.device) -> "BlockPixels":
        return self

    def array(self, row: int) -> np.ndarray:
        height, width = self._sizes[row].tolist()
        start = int(self._sizes[:row].prod(1).sum())
        return self._block[start : start + height * width].view(height, width, 3).cpu().numpy()


def _fits(count: int, device: torch.device) -> bool:
    """True where so many bytes may stay on the device; on the CPU images stay where they are, in mapped files."""
    return device.type == "cuda" and count <= torch.cuda.mem_get_info(device)[1] // _SHARE


def _as_images(pixels_BHWC: Tensor) -> Tensor:
    """Bytes as images (B, C, S, S) in [0, 1]; channels are moved to the front while a pixel is still a byte."""
    return pixels_BHWC.permute(0, 3, 1, 2).contiguous().float().div_(255)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="inflora-images")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads stay with the parent
