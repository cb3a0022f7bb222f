"""Drift: the distance that the features of old tasks' images have moved since their task was learnt.

A few evaluation images of every task are remembered by their features; nothing is learnt from them.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from inflora import distributed
from inflora.data.stream import Task

PROBES = 64
"""The most images of a task that are remembered by their features."""


class Probes:
    """Features (up to 64 x D) of evaluation images spread evenly over each task's, picked up while all are evaluated.

    ``see`` is shown features with their images' places among the tasks' evaluation images, one task after another.
    """

    def __init__(self, tasks: Sequence[Task], width: int, device: torch.device) -> None:
        self.tasks = tasks
        images = [len(task.eval_rows) for task in tasks]
        self.counts = [min(PROBES, number) for number in images]
        # Where an image's features are kept: all that are no probes share one last row, which nobody reads.
        self._row_of = torch.full((sum(images),), sum(self.counts), device=device)
        starts = [sum(images[:index]) for index in range(len(tasks))]
        chosen = [
            start + torch.arange(count, device=device) * (number - 1) // max(count - 1, 1)
            for start, number, count in zip(starts, images, self.counts, strict=True)
        ]
        self._row_of[torch.cat(chosen)] = torch.arange(sum(self.counts), device=device)
        self._features = torch.zeros(sum(self.counts) + 1, width, device=device)

    def see(self, places: Tensor, features_BD: Tensor) -> None:
        """Keep those of the features that are probes."""
        self._features[self._row_of[places]] = features_BD

    def features(self) -> dict[str, Tensor]:
        """The features by the index of their task, on the CPU, when all images of all workers have been seen."""
        parts = distributed.all_sum(self._features[:-1]).cpu().split(self.counts)
        return {str(task.index): part.clone() for task, part in zip(self.tasks, parts, strict=True)}


def drifts(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, float]:
    """``drift/task<j>`` of every old task, and ``drift/mean`` over them."""
    moved = {f"drift/task{task}": drift(features, now[task]) for task, features in before.items()}
    return moved | ({"drift/mean": fmean(moved.values())} if moved else {})


def drift(before: Tensor, now: Tensor) -> float:
    """Mean over images of ``|now - before| / |before|``, for features (N x D) of the same images."""
    return float(((now - before).norm(dim=1) / before.norm(dim=1).clamp_min(1e-12)).mean())
