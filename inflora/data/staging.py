"""From the host's memory to the device that trains, while both go on with their work.

Copies run on a stream of their own out of pinned memory. PyTorch's host allocator gives a pinned block out again only
when the copies from it are done, so a block may be let go of as soon as its copy has been asked for.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Arrived(NamedTuple):
    """Images (B, C, S, S) in [0, 1] on the device, and for how many seconds it had nothing to do until they came.

    The seconds can be asked for when the device has used the images.
    """

    images: Tensor
    waited: Callable[[], float]


class Pending(Protocol):
    """Images on their way to the device: call it to have them there."""

    def send(self) -> None:
        """Start the copy to the device if there is something to copy by now; never waits."""

    def __call__(self) -> Arrived: ...


class Resident:
    """Images of which all that is needed is on the device: they are made there in turn, like everything else."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make

    def send(self) -> None:
        pass

    def __call__(self) -> Arrived:
        return Arrived(self._make(), lambda: 0.0)


class Staged:
    """Images that threads prepare on the host, in the memory that ``prepared`` gives when ``work`` is done.

    ``finish`` makes of it, on the device, what the model reads.
    """

    def __init__(
        self,
        work: Sequence[Future[Any]],
        prepared: Callable[[], Tensor],
        device: torch.device,
        finish: Callable[[Tensor], Tensor] = lambda images: images,
    ) -> None:
        self._work, self._prepared, self._device, self._finish = work, prepared, device, finish
        self._sent: Callable[[], Tensor] | None = None

    def send(self) -> None:
        if self._sent is None and all(part.done() for part in self._work):
            self._sent = self._send()

    def _send(self) -> Callable[[], Tensor]:
        for part in self._work:
            part.result()
        return copy_ahead(self._prepared(), self._device)

    def __call__(self) -> Arrived:
        clock = HostClock() if self._device.type == "cpu" else DeviceClock(self._device)
        pixels = (self._sent or self._send())()
        waited = clock.stop()  # what is made of the pixels now is work, no waiting
        return Arrived(self._finish(pixels), waited)


def host_memory(shape: Sequence[int], device: torch.device) -> Tensor:
    """Memory of the host for bytes that ``device`` is to have: pinned, where the device is another one."""
    return torch.empty(tuple(shape), dtype=torch.uint8, pin_memory=device.type == "cuda")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on ``device`` that the host does not wait for; the tensor itself where it is there already."""
    if tensor.device == device:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def copy_ahead(pixels: Tensor, device: torch.device) -> Callable[[], Tensor]:
    """Start a copy of pinned memory beside what the device computes; call the result to use the copy from now on."""
    if device.type == "cpu":
        return lambda: pixels
    stream = _copy_stream(device)
    with torch.cuda.stream(stream):
        copy = pixels.to(device, non_blocking=True)
        done = stream.record_event()

    def arrive() -> Tensor:
        computing = torch.cuda.current_stream(device)
        computing.wait_event(done)
        # Its memory belongs to the other stream, which must not give it away while this one reads it.
        copy.record_stream(computing)
        return copy

    return arrive


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class HostClock:
    """Seconds on the CPU, from the beginning."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def stop(self) -> Callable[[], float]:
        """Stop now; call the result for the seconds."""
        seconds = time.perf_counter() - self._start
        return lambda: seconds


class DeviceClock:
    """Seconds on a GPU, from the beginning: they stand still for as long as it is busy with earlier work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._now()

    def stop(self) -> Callable[[], float]:
        """Stop when the device has come this far; call the result after that for the seconds."""
        end = self._now()
        return lambda: self._start.elapsed_time(end) / 1000

    def _now(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self._device).record_event(torch.cuda.Event(enable_timing=True))
