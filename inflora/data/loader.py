"""Batches of one task: shuffled, shared out over the workers, augmented on the device."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from inflora import distributed
from inflora.config import DataSettings
from inflora.data.augment import crop_and_resize, sample_crops, whole_image
from inflora.data.store import Images


class Batch(NamedTuple):
    """This worker's share of a global batch: images (B, C, S, S) float, labels (B), and its part of the batch."""

    images: Tensor
    labels: Tensor
    share: float


class Input(NamedTuple):
    """How stored pixels become the model's input."""

    data: DataSettings
    side: int
    channels: int
    device: torch.device


def training_batches(
    images: Images, rows: Tensor, input: Input, batch_size: int, generator: torch.Generator
) -> Iterator[Batch]:
    """One shuffled, augmented pass over ``rows``, in global batches of ``batch_size``.

    Every worker draws the same order and the same crops and takes every n-th image of each batch, so the global batches
    do not depend on the number of workers. The last batch may be smaller.
    """
    height, width = images.pixels.shape[1:3]
    augment = input.data.augment
    shuffled = rows[torch.randperm(len(rows), generator=generator)]
    for chosen in shuffled.split(batch_size):
        crops = (
            whole_image(len(chosen), height, width)
            if augment == "none"
            else sample_crops(len(chosen), height, width, augment, generator)
        )
        mine = slice(distributed.rank(), None, distributed.world_size())
        local = chosen[mine]
        pixels = images.pixels[local].to(input.device)
        view = crop_and_resize(pixels, crops.take(mine).to(input.device), input.side)
        yield Batch(_as_input(view, input), images.labels[local].to(input.device), len(local) / len(chosen))


def evaluation_batches(images: Images, rows: Tensor, input: Input, batch_size: int) -> Iterator[Batch]:
    """This worker's share of one plain pass over ``rows``."""
    for local in rows[distributed.rank() :: distributed.world_size()].split(batch_size):
        pixels = images.pixels[local].to(input.device)
        crops = whole_image(len(local), *pixels.shape[1:3]).to(input.device)
        view = crop_and_resize(pixels, crops, input.side)
        yield Batch(_as_input(view, input), images.labels[local].to(input.device), len(local) / len(rows))


def seeded(seed: int, *purpose: str | int) -> torch.Generator:
    """A generator of its own for each purpose, so that a resumed run draws what an uninterrupted one does."""
    digest = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _as_input(view: Tensor, input: Input) -> Tensor:
    if view.shape[1] == 1 and input.channels > 1:
        view = view.expand(-1, input.channels, -1, -1)
    if (input.data.mean, input.data.std) == (0.0, 1.0):
        return view
    return (view - input.data.mean) / input.data.std
