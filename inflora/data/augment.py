"""Per-sample crops and flips, and the resize of evaluation, on the device that trains.

Shapes: B batch, C channels, H x W stored image, S side of the model's input.

The random numbers of a whole global batch are drawn on the CPU, then each worker takes its share: the augmentation of
an image depends neither on the number of workers nor on the kind of device.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from inflora.config import AugmentSettings

_ATTEMPTS = 10  # as torchvision's RandomResizedCrop


class Crops(NamedTuple):
    """One box per image and whether to mirror it.

    ``boxes`` (B, 4) are top, left, height and width in pixels, ``flip`` (B) is 1 where the image is mirrored.
    ``cut``: the box is cut out before it is resized (RandomResizedCrop), so nothing beyond its border shines in;
    otherwise it is a window on the resized whole image (Resize and CenterCrop).
    """

    boxes: Tensor
    flip: Tensor
    cut: bool

    def take(self, rows: slice) -> "Crops":
        """The boxes of some of the images."""
        return Crops(self.boxes[rows], self.flip[rows], self.cut)


def central_views(sizes: Tensor, side: int, resize: int) -> Crops:
    """Windows as of torchvision's Resize(``resize``) then CenterCrop(``side``), in pixels of the image before them."""
    height, width = sizes.double().T
    short = torch.minimum(height, width)
    resized = [(resize * length / short).floor() for length in (height, width)]  # the shorter one exactly ``resize``
    # Half-way cases go to the even number, as Python's round in CenterCrop does.
    starts = [((length - side) / 2).round() for length in resized]
    scales = [length / after for length, after in zip((height, width), resized, strict=True)]
    boxes = [start * scale for start, scale in zip(starts, scales, strict=True)] + [side * scale for scale in scales]
    return Crops(torch.stack(boxes, 1).float(), torch.zeros(len(sizes)), cut=False)


def sample_crops(sizes: Tensor, settings: AugmentSettings, generator: torch.Generator) -> Crops:
    """Boxes distributed as those of torchvision's RandomResizedCrop and RandomHorizontalFlip.

    ``sizes`` (B, 2) are the images' heights and widths.
    """
    count = len(sizes)
    height, width = sizes.float().T[:, :, None]
    # All attempts are drawn at once: with a loop until one fits, an image's numbers would hang on those before it.
    uniform = torch.rand(5, count, _ATTEMPTS, generator=generator)
    area = height * width * (settings.scale[0] + (settings.scale[1] - settings.scale[0]) * uniform[0])
    log_ratio = [math.log(bound) for bound in settings.ratio]
    ratio = torch.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * uniform[1])
    box_width, box_height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (box_width > 0) & (box_width <= width) & (box_height > 0) & (box_height <= height)
    found, first = fits.any(1), fits.int().argmax(1)[:, None]
    height, width = height[:, 0], width[:, 0]
    central_height, central_width = _central_boxes(height, width, settings.ratio)
    box_height = torch.where(found, box_height.gather(1, first)[:, 0], central_height)
    box_width = torch.where(found, box_width.gather(1, first)[:, 0], central_width)
    random_top = (uniform[2, :, 0] * (height - box_height + 1)).floor()
    random_left = (uniform[3, :, 0] * (width - box_width + 1)).floor()
    top = torch.where(found, random_top, ((height - central_height) / 2).floor())
    left = torch.where(found, random_left, ((width - central_width) / 2).floor())
    flip = (uniform[4, :, 0] < 0.5).float() if settings.flip else torch.zeros(count)
    return Crops(torch.stack([top, left, box_height, box_width], 1), flip, cut=True)


def _central_boxes(height: Tensor, width: Tensor, ratio: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """torchvision's answer when no attempt fits: the largest central box within the ratio's bounds.

    Of a pixel at least: torchvision's is empty where the ratio is beyond an image's side.
    """
    too_narrow, too_wide = width / height < ratio[0], width / height > ratio[1]
    return (
        torch.where(too_narrow, (width / ratio[0]).round().clamp_min(1), height),
        torch.where(too_wide, (height * ratio[1]).round().clamp_min(1), width),
    )


def crop_and_resize(pixels_BHWC: Tensor, crops: Crops, side: int, sizes: Tensor | None = None) -> Tensor:
    """Each image's box, resized bilinearly with antialiasing to (B, C, S, S) and scaled to [0, 1].

    ``sizes`` (B, 2) are heights and widths where images do not fill H x W: what lies beyond is not looked at.
    Resizing is linear in rows and in columns: two batched matrix products, the same for boxes of all sizes.
    """
    _, height, width, _ = pixels_BHWC.shape
    top, left, box_height, box_width = crops.boxes.T
    heights, widths = (torch.full_like(top, height), torch.full_like(left, width)) if sizes is None else sizes.to(top).T
    if crops.cut:
        bounds = ((top, top + box_height), (left, left + box_width))
    else:
        bounds = ((torch.zeros_like(top), heights), (torch.zeros_like(left), widths))
    rows_BSH = _resize_weights(top, box_height, side, height, *bounds[0])
    columns_BSW = _resize_weights(left, box_width, side, width, *bounds[1])
    columns_BSW = torch.where(crops.flip[:, None, None] > 0, columns_BSW.flip(1), columns_BSW)
    images = pixels_BHWC.float() / 255
    return torch.einsum("bsh,bhwc,btw->bcst", rows_BSH, images, columns_BSW)


def _resize_weights(start: Tensor, length: Tensor, side: int, size: int, first: Tensor, end: Tensor) -> Tensor:
    """The weight of each of the ``size`` stored pixels along one axis in each of the S new ones (B, S, size).

    The triangle filter of PyTorch's and Pillow's antialiased bilinear resize: as wide as a new pixel, at least as
    wide as an old one. Nothing before ``first`` (B) and from ``end`` (B) on is looked at.
    """
    scale = (length / side)[:, None, None]
    old = torch.arange(size, device=start.device) + 0.5
    new = start[:, None, None] + (torch.arange(side, device=start.device) + 0.5)[:, None] * scale
    weights = (1 - (old - new).abs() / scale.clamp_min(1)).clamp_min(0)
    # Cut off before the sum: what is left must weigh 1, or borders darken.
    weights = weights * ((old > first[:, None, None]) & (old < end[:, None, None]))
    return weights / weights.sum(2, keepdim=True)
