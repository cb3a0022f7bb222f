"""All that a run leaves to chance.

Every purpose has a generator of its own, so that a resumed run draws the numbers of an uninterrupted one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from inflora.data.loader import seeded
from inflora.data.stream import Task
from inflora.gaussians import Gaussians, sample


class Draws:
    """Orders of images, beginnings of classifiers, features to align them on. ``Replay`` has recorded ones."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def generator(self, task: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
        """The generator of one purpose in one task."""
        return seeded(self.seed, task, *purpose, device=device)

    def order(self, task: Task, purpose: str, generator: torch.Generator) -> Tensor:
        """The rows of a task's training images in the order of one pass."""
        return task.train_rows[torch.randperm(len(task.train_rows), generator=generator)]

    def begin_head(self, head: nn.Linear, task: int, init: str) -> None:
        """Set where a task's linear classifier begins; ``init`` "uniform" is ``nn.Linear``'s own, "zero" all zeros."""
        bound = head.in_features**-0.5 if init == "uniform" else 0.0
        generator = self.generator(task, "head")
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.uniform_(-bound, bound, generator=generator) if bound else parameter.zero_()

    def class_features(
        self, gaussians: Sequence[Gaussians], classes_C: Tensor, samples: int, task: int, epoch: int
    ) -> tuple[Tensor, Tensor]:
        """Features (N x D) and their classes (N), shuffled, for an epoch of alignment after ``task``.

        ``samples`` from each of the ``gaussians``, which are those of ``classes_C``, on the device where they are.
        """
        generator = self.generator(task, "alignment", epoch, device=classes_C.device)
        features_ND = sample(gaussians, samples, generator)
        classes_N = classes_C.repeat_interleave(samples)
        order_N = torch.randperm(len(classes_N), generator=generator, device=classes_N.device)
        return features_ND.index_select(0, order_N), classes_N.index_select(0, order_N)
