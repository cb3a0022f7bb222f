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
    """One box per image, in pixels, and whether to mirror it; each field is float (B)."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor

    def take(self, rows: slice) -> "Crops":
        """The boxes of some of the images."""
        return Crops(*(field[rows] for field in self))

    def to(self, device: torch.device) -> "Crops":
        """The same boxes on ``device``."""
        return Crops(*(field.to(device) for field in self))


def whole_image(count: int, height: int, width: int) -> Crops:
    """No augmentation: each box is the image."""
    zero = torch.zeros(count)
    return Crops(zero, zero, zero + height, zero + width, zero)


def sample_crops(count: int, height: int, width: int, settings: AugmentSettings, generator: torch.Generator) -> Crops:
    """Boxes distributed as those of torchvision's RandomResizedCrop and RandomHorizontalFlip."""
    uniform = torch.rand(5, count, _ATTEMPTS, generator=generator)
    area = height * width * (settings.scale[0] + (settings.scale[1] - settings.scale[0]) * uniform[0])
    log_ratio = [math.log(bound) for bound in settings.ratio]
    ratio = torch.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * uniform[1])
    box_width, box_height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (box_width > 0) & (box_width <= width) & (box_height > 0) & (box_height <= height)
    first = torch.where(fits.any(1), fits.int().argmax(1), 0)[:, None]
    central_height, central_width = _central_box(height, width, settings.ratio)
    box_height = torch.where(fits.any(1), box_height.gather(1, first)[:, 0], central_height)
    box_width = torch.where(fits.any(1), box_width.gather(1, first)[:, 0], central_width)
    top = torch.where(
        fits.any(1), (uniform[2, :, 0] * (height - box_height + 1)).floor(), (height - central_height) // 2
    )
    left = torch.where(fits.any(1), (uniform[3, :, 0] * (width - box_width + 1)).floor(), (width - central_width) // 2)
    flip = (uniform[4, :, 0] < 0.5).float() if settings.flip else torch.zeros(count)
    return Crops(top, left, box_height, box_width, flip)


def _central_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[float, float]:
    """torchvision's answer when no attempt fits: the largest central box within the ratio's bounds."""
    if width / height < ratio[0]:
        return round(width / ratio[0]), width
    if width / height > ratio[1]:
        return height, round(height * ratio[1])
    return height, width


def crop_and_resize(pixels_BHWC: Tensor, crops: Crops, side: int) -> Tensor:
    """Each image's box, resized bilinearly to (B, C, S, S) and scaled to [0, 1]."""
    images = pixels_BHWC.permute(0, 3, 1, 2).float() / 255
    _, _, height, width = images.shape
    y = _sample_points(crops.top, crops.height, side, height)
    x = _sample_points(crops.left, crops.width, side, width)
    x = torch.where(crops.flip[:, None] > 0, x.flip(1), x)
    grid = torch.stack([x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], dim=-1)
    return torch.nn.functional.grid_sample(images, grid, mode="bilinear", align_corners=True)


def _sample_points(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """Where the S output pixels of each box lie (B x S), in grid_sample's [-1, 1] over pixel centres.

    Kept inside the box, so that nothing beyond its border shines in: the same as cropping before resizing.
    """
    centres = (torch.arange(side, device=start.device) + 0.5) / side
    points = start[:, None] + (centres * length[:, None] - 0.5).clamp_min(0)
    points = torch.minimum(points, (start + length - 1)[:, None])
    return points * (2 / max(size - 1, 1)) - 1
