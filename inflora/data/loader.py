"""Batches of one task: shuffled, shared out over the workers, augmented on the device."""

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from inflora import distributed
from inflora.config import DataSettings
from inflora.data.augment import Crops, central_views, sample_crops
from inflora.data.pixels import Views
from inflora.data.staging import to_device
from inflora.data.store import Images

_AHEAD = 3  # batches in the making while the model computes on one


class Batch(NamedTuple):
    """This worker's share of a global batch: images (B, C, S, S) float, labels (B), and its part of the batch.

    ``waited`` says, when the device has computed on the batch, for how many seconds it could not, for want of images.
    """

    images: Tensor
    labels: Tensor
    share: float
    waited: Callable[[], float] = lambda: 0.0


class InputFormat(NamedTuple):
    """The form in which stored pixels become the model's input."""

    data: DataSettings
    side: int
    channels: int
    device: torch.device


def training_batches(
    images: Images, rows: Tensor, input_format: InputFormat, batch_size: int, generator: torch.Generator
) -> Iterator[Batch]:
    """One augmented pass over ``rows`` in the order given, in global batches of ``batch_size``.

    Every worker is given the same order, draws the same crops and takes every n-th image of each batch, so the global
    batches do not depend on the number of workers. The last batch may be smaller.
    """
    mine = slice(distributed.rank(), None, distributed.world_size())
    shares = []
    for chosen in rows.split(batch_size):
        # For the whole batch on every worker, then this worker's: so the draws do not depend on how many there are.
        crops = _training_crops(images.pixels.sizes(chosen), input_format, generator)
        shares.append(_Share(Views(chosen[mine], crops.take(mine)), len(chosen[mine]) / len(chosen)))
    return _batches(images, shares, input_format)


def evaluation_batches(images: Images, rows: Tensor, input_format: InputFormat, batch_size: int) -> Iterator[Batch]:
    """This worker's share of one plain pass over ``rows``."""
    mine = rows[distributed.rank() :: distributed.world_size()]
    shares = [
        _Share(Views(local, _evaluation_crops(images.pixels.sizes(local), input_format)), len(local) / len(rows))
        for local in mine.split(batch_size)
    ]
    return _batches(images, shares, input_format)


class _Share(NamedTuple):
    """One worker's views of a batch, and the part of the batch that they are."""

    views: Views
    share: float


def _batches(images: Images, shares: Sequence[_Share], input_format: InputFormat) -> Iterator[Batch]:
    """The batches one by one, while the images of the next few are being made.

    What is known of a pass beforehand (which images, their boxes and labels) is copied to the device once, so that no
    batch waits for a copy but that of its images.
    """
    if not shares:
        return
    sizes = [len(share.views.rows) for share in shares]
    whole = Views.joined([share.views for share in shares])
    there = whole.to(input_format.device).split(sizes)
    labels = to_device(images.labels[whole.rows], input_format.device).split(sizes)
    as_input = _normalisation(input_format)
    started = (
        (images.pixels.start(views, views_there, input_format.side), batch_labels, share)
        for (views, share), views_there, batch_labels in zip(shares, there, labels, strict=True)
    )
    ahead = deque(itertools.islice(started, _AHEAD))
    while ahead:
        pending, batch_labels, share = ahead.popleft()
        ahead.extend(itertools.islice(started, 1))
        images_here, waited = pending()
        for later, *_ in ahead:
            later.send()  # copies run beside the step that the caller takes now
        yield Batch(as_input(images_here), batch_labels, share, waited)


def _training_crops(sizes: Tensor, input_format: InputFormat, generator: torch.Generator) -> Crops:
    augment = input_format.data.augment
    return _evaluation_crops(sizes, input_format) if augment == "none" else sample_crops(sizes, augment, generator)


def _evaluation_crops(sizes: Tensor, input_format: InputFormat) -> Crops:
    return central_views(sizes, input_format.side, input_format.data.eval_resize or input_format.side)


def seeded(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for each purpose, so that a resumed run draws what an uninterrupted one does.

    On another ``device`` it draws other numbers, there.
    """
    digest = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _normalisation(input_format: InputFormat) -> Callable[[Tensor], Tensor]:
    """From images in [0, 1] to the model's input: as many channels, mean and standard deviation as it wants."""
    settings, channels = input_format.data, input_format.channels

    def with_channels(images: Tensor) -> Tensor:
        return images.expand(-1, channels, -1, -1) if images.shape[1] == 1 < channels else images

    if (settings.mean, settings.std) == (0.0, 1.0):
        return with_channels
    mean, std = (
        to_device(torch.tensor(value).view(-1, 1, 1), input_format.device) for value in (settings.mean, settings.std)
    )
    return lambda images: (with_channels(images) - mean) / std
