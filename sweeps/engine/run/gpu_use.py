"""How much of its GPU a trial uses: the card is looked at by a thread, and told of with each task's report."""

import threading
from statistics import fmean
from types import TracebackType
from typing import Protocol, Self

import torch

SAMPLE_EVERY_S = 1.0


class Gpu(Protocol):
    """What is asked of a card."""

    memory_gb: float

    def busy(self) -> float | None:
        """Percent of the last moments in which the card worked, for whomever; None where nothing can tell."""

    def take_peak_gb(self) -> float:
        """The most memory that this process has held since this was asked last."""


class CudaGpu:
    """A card that PyTorch uses; how busy it is NVIDIA's library tells, where it is installed and may be asked."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.memory_gb = torch.cuda.get_device_properties(device).total_memory / 2**30

    def busy(self) -> float | None:
        try:
            return float(torch.cuda.utilization(self._device))
        except Exception:  # no such library, a driver without it, a slice of a card: the trial goes on without
            return None

    def take_peak_gb(self) -> float:
        peak = torch.cuda.max_memory_allocated(self._device) / 2**30
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak


def gpu_of(device: torch.device) -> Gpu | None:
    """The card behind a device; None of the CPU."""
    return CudaGpu(device) if device.type == "cuda" else None


class GpuMeter:
    """Looks at a GPU as long as it is entered; without one it measures nothing."""

    def __init__(self, gpu: Gpu | None, every_s: float = SAMPLE_EVERY_S) -> None:
        self._gpu, self._every_s = gpu, every_s
        self._samples: list[float] = []
        self._left = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._gpu is not None:
            self._thread = threading.Thread(target=self._look, args=(self._gpu,), daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        if self._thread is not None:
            self._thread.join(2 * self._every_s)  # a sick card may never answer

    def _look(self, gpu: Gpu) -> None:
        while not self._left.wait(self._every_s):
            if (busy := gpu.busy()) is None:
                return
            self._samples.append(busy)

    def take(self) -> dict[str, float]:
        """The metrics since this was asked last: a task's, where it is asked after each."""
        if self._gpu is None:
            return {}
        samples, self._samples = self._samples, []
        peak_gb = self._gpu.take_peak_gb()
        metrics = {"gpu/memory_gb": peak_gb, "gpu/memory_share": peak_gb / self._gpu.memory_gb}
        return metrics | ({"gpu/utilisation": fmean(samples)} if samples else {})
