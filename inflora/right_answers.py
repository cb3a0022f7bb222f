"""Right answers, counted on the device that gives them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from inflora import distributed
from inflora.data.stream import Stream, Task
from inflora.metrics import Evaluation, TaskCounts


class RightAnswers:
    """Counts of right answers on the images of ``tasks``, all classes that they have together competing.

    They are counted on the device: the host waits once, for ``evaluation``.
    """

    def __init__(self, stream: Stream, tasks: Sequence[Task], device: torch.device) -> None:
        self._counts = torch.zeros(len(tasks), 5, dtype=torch.int64, device=device)
        self._first_labels = torch.tensor([task.first_label for task in tasks], device=device)
        self._class_of, self._last_task = stream.class_of.to(device), tasks[-1].index

    def count(self, logits_BC: Tensor, labels_B: Tensor) -> None:
        """Add a batch of images with these logits and labels."""
        label_tasks, class_tasks = (
            torch.bucketize(labels, self._first_labels, right=True) - 1
            for labels in (labels_B, torch.arange(logits_BC.shape[1], device=labels_B.device))
        )
        predicted = logits_BC.argmax(1)
        own = logits_BC.masked_fill(class_tasks[None, :] != label_tasks[:, None], -math.inf).argmax(1)
        hits = torch.stack(
            [
                torch.ones_like(predicted),
                (self._class_of[predicted] == self._class_of[labels_B]).long(),
                (own == labels_B).long(),
                (class_tasks[predicted] == label_tasks).long(),
                (~torch.isfinite(logits_BC)).any(1).long(),
            ],
            dim=1,
        )
        self._counts.index_add_(0, label_tasks, hits)

    def evaluation(self) -> Evaluation:
        """The counts of all workers, who all hear of what one of them has seen.

        Raises:
            FloatingPointError: Some logits were no finite numbers.
        """
        *hits_of_tasks, broken = zip(*distributed.all_sum(self._counts).tolist(), strict=True)
        if any(broken):
            raise FloatingPointError(f"the logits after task {self._last_task} are not finite; try a smaller optim.lr")
        return tuple(
            TaskCounts(images=images, correct=correct, correct_in_task=in_task, right_task=right_task)
            for images, correct, in_task, right_task in zip(*hits_of_tasks, strict=True)
        )
