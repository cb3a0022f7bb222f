"""Batches of one task: shuffled, shared out over the workers, augmented on the device."""

import hashlib
import itertools
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from inflora import distributed
from inflora.config import DataSettings
from inflora.data.augment import Crops, central_views, sample_crops
from inflora.data.pixels import Pending
from inflora.data.store import Images

_AHEAD = 3  # batches in the making while the model computes on one


class Batch(NamedTuple):
    """This worker's share of a global batch: images (B, C, S, S) float, labels (B), and its part of the batch.

    ``waited`` is for how many seconds nothing could be computed because the images were not ready.
    """

    images: Tensor
    labels: Tensor
    share: float
    waited: float = 0.0


class Input(NamedTuple):
    """How stored pixels become the model's input."""

    data: DataSettings
    side: int
    channels: int
    device: torch.device


def training_batches(
    images: Images, rows: Tensor, input: Input, batch_size: int, generator: torch.Generator
) -> Iterator[Batch]:
    """One augmented pass over ``rows`` in the order given, in global batches of ``batch_size``.

    Every worker is given the same order, draws the same crops and takes every n-th image of each batch, so the global
    batches do not depend on the number of workers. The last batch may be smaller.
    """

    def started() -> Iterator[_Started]:
        for chosen in rows.split(batch_size):
            crops = _training_crops(images.pixels.sizes(chosen), input, generator)
            mine = slice(distributed.rank(), None, distributed.world_size())
            yield _start(images, chosen[mine], crops.take(mine), input, len(chosen))

    return _finished(started(), input)


def evaluation_batches(images: Images, rows: Tensor, input: Input, batch_size: int) -> Iterator[Batch]:
    """This worker's share of one plain pass over ``rows``."""

    def started() -> Iterator[_Started]:
        for local in rows[distributed.rank() :: distributed.world_size()].split(batch_size):
            crops = _evaluation_crops(images.pixels.sizes(local), input)
            yield _start(images, local, crops, input, len(rows))

    return _finished(started(), input)


class _Started(NamedTuple):
    """A batch whose images are being made."""

    view: Pending
    labels: Tensor
    share: float


def _start(images: Images, rows: Tensor, crops: Crops, input: Input, whole: int) -> _Started:
    view = images.pixels.start(rows, crops, input.side, input.device)
    return _Started(view, images.labels[rows], len(rows) / whole)


def _finished(batches: Iterator[_Started], input: Input) -> Iterator[Batch]:
    """The batches one by one, while the images of the next few are being made."""
    ahead = deque(itertools.islice(batches, _AHEAD))
    while ahead:
        view, labels, share = ahead.popleft()
        ahead.extend(itertools.islice(batches, 1))
        start = time.perf_counter()
        images = _as_input(view(), input)
        yield Batch(images, labels.to(input.device), share, waited=time.perf_counter() - start)


def _training_crops(sizes: Tensor, input: Input, generator: torch.Generator) -> Crops:
    augment = input.data.augment
    return _evaluation_crops(sizes, input) if augment == "none" else sample_crops(sizes, augment, generator)


def _evaluation_crops(sizes: Tensor, input: Input) -> Crops:
    return central_views(sizes, input.side, input.data.eval_resize or input.side)


def seeded(seed: int, *purpose: str | int) -> torch.Generator:
    """A generator of its own for each purpose, so that a resumed run draws what an uninterrupted one does."""
    digest = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _as_input(view: Tensor, input: Input) -> Tensor:
    if view.shape[1] == 1 and input.channels > 1:
        view = view.expand(-1, input.channels, -1, -1)
    if (input.data.mean, input.data.std) == (0.0, 1.0):
        return view
    mean, std = (torch.tensor(value, device=view.device).view(-1, 1, 1) for value in (input.data.mean, input.data.std))
    return (view - mean) / std
