"""The metrics of a continual learner, from counts of right answers (pure).

Notation: ``a[i][j]`` is the accuracy on task j's images after learning task i (both from 0), over all classes seen,
with no task identity given. Other libraries mean other things by the same words, so each formula stands here.
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, model_validator


class TaskCounts(BaseModel):
    """Right answers on the images of one task, by a model that has learnt some tasks."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    images: PositiveInt
    correct: NonNegativeInt  # the right class among all classes seen
    correct_in_task: NonNegativeInt  # the right class among the classes of the image's own task
    right_task: NonNegativeInt  # the predicted class lies in the image's own task

    @model_validator(mode="after")
    def _at_most_all(self) -> "TaskCounts":
        if max(self.correct, self.correct_in_task, self.right_task) > self.images:
            raise ValueError(f"no more than all {self.images} images can be right")
        return self


Evaluation = tuple[TaskCounts, ...]
"""Counts on every task seen so far, in order of learning."""


def accuracy_row(evaluation: Evaluation) -> list[float]:
    """``a[i]``: the accuracy on each task seen so far."""
    return [counts.correct / counts.images for counts in evaluation]


def task_aware_row(evaluation: Evaluation) -> list[float]:
    """The accuracy on each task seen so far among the classes of that task alone."""
    return [counts.correct_in_task / counts.images for counts in evaluation]


def accuracy_matrix(evaluations: Sequence[Evaluation]) -> list[list[float]]:
    """``a[i][j]`` for j <= i; row i has i + 1 entries."""
    return [accuracy_row(evaluation) for evaluation in evaluations]


def seen(evaluation: Evaluation) -> float:
    """``acc/seen``: accuracy over all images of the classes seen (micro); the paper's ACC_i."""
    return sum(c.correct for c in evaluation) / sum(c.images for c in evaluation)


def task_metrics(evaluations: Sequence[Evaluation]) -> dict[str, float]:
    """Metrics that exist after every task, of the last of ``evaluations``.

    ``acc/seen_macro``: mean over tasks of ``a[i][j]``; ``acc/new``: ``a[i][i]``; ``acc/task_aware``: accuracy when the
    task is known; ``acc/task_identity``: how often the predicted class lies in the right task.
    """
    last = evaluations[-1]
    images = sum(c.images for c in last)
    row = accuracy_row(last)
    return {
        "acc/seen": seen(last),
        "acc/seen_macro": sum(row) / len(row),
        "acc/new": row[-1],
        "acc/task_aware": sum(c.correct_in_task for c in last) / images,
        "acc/task_identity": sum(c.right_task for c in last) / images,
    }


def final_metrics(evaluations: Sequence[Evaluation]) -> dict[str, float]:
    """Metrics that exist only when the last task is done.

    ``acc/final``: ``acc/seen`` after the last task; ``acc/avg_incremental``: mean over i of ``acc/seen``;
    ``forgetting`` and ``bwt`` as below.
    """
    matrix = accuracy_matrix(evaluations)
    curve = [seen(evaluation) for evaluation in evaluations]
    return {
        "acc/final": curve[-1],
        "acc/avg_incremental": sum(curve) / len(curve),
        "forgetting": forgetting(matrix),
        "bwt": backward_transfer(matrix),
    }


def metrics_after(evaluations: Sequence[Evaluation], tasks: int) -> dict[str, float]:
    """Everything known after the last of ``evaluations``, in a stream of ``tasks`` tasks."""
    is_last = len(evaluations) == tasks
    return task_metrics(evaluations) | (final_metrics(evaluations) if is_last else {})


def forgetting(matrix: Sequence[Sequence[float]]) -> float:
    """Mean over j < T of (max over i < T of ``a[i][j]``) - ``a[T][j]``; 0 when there is one task."""
    tasks = len(matrix)
    drops = [max(matrix[i][j] for i in range(j, tasks - 1)) - matrix[-1][j] for j in range(tasks - 1)]
    return sum(drops) / len(drops) if drops else 0.0


def backward_transfer(matrix: Sequence[Sequence[float]]) -> float:
    """Mean over j < T of ``a[T][j] - a[j][j]``; 0 when there is one task."""
    changes = [matrix[-1][j] - matrix[j][j] for j in range(len(matrix) - 1)]
    return sum(changes) / len(changes) if changes else 0.0


class Spread(NamedTuple):
    """Mean and sample standard deviation over runs; one run has no spread."""

    mean: float
    std: float | None


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
