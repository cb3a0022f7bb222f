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

    ``acc/final``: ``acc/seen`` after the last task; ``acc/avg_incremental``: mean over i of ``acc/seen``, ``..._macro``
    of ``acc/seen_macro``; ``forgetting`` and ``bwt`` as below.
    """
    matrix = accuracy_matrix(evaluations)
    curve = [seen(evaluation) for evaluation in evaluations]
    macro = [sum(row) / len(row) for row in matrix]
    return {
        "acc/final": curve[-1],
        "acc/avg_incremental": sum(curve) / len(curve),
        "acc/avg_incremental_macro": sum(macro) / len(macro),
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


def forward_transfer(ahead: Sequence[float], classes: int) -> float:
    """Mean over j > 0 of ``a[j-1][j] - 1/C``: accuracy on tasks not yet learnt, above chance; 0 for one task.

    ``ahead`` are ``a[0][1]``, ``a[1][2]``, ... 1/C is the expected accuracy of a classifier drawn at random: no class
    is then likelier than another, whatever the features.
    """
    return sum(ahead) / len(ahead) - 1 / classes if ahead else 0.0


class Alias(NamedTuple):
    """A metric by its name here, the names that papers give it, and its formula; ``note``: where names mislead."""

    here: str
    field: str
    formula: str
    note: str = ""


ALIASES = (
    Alias("acc/seen", "ACC_i, A_b", "right images / all images, over the tasks seen so far"),
    Alias("acc/final", "A_last, A_B, A_T", "acc/seen after the last task"),
    Alias("acc/avg_incremental", "A-bar, average incremental accuracy", "1/T sum_i acc/seen after task i"),
    Alias(
        "acc/seen_macro",
        "AA_i; FAA after the last task",
        "1/i sum_{j<=i} a[i][j]",
        "every task counts alike, in acc/seen every image: the same where all tasks have as many images",
    ),
    Alias("acc/avg_incremental_macro", "CAA", "1/T sum_i AA_i"),
    Alias(
        "forgetting",
        "FFM, FM, F_T",
        "1/(T-1) sum_{j<T} (max_{i<T} a[i][j] - a[T][j])",
        "PyCIL and PILOT let i reach T, so that theirs is never negative",
    ),
    Alias("bwt", "BWT", "1/(T-1) sum_{j<T} (a[T][j] - a[j][j])"),
    Alias(
        "fwt",
        "FWT",
        "1/(T-1) sum_{j>1} a[j-1][j] - 1/C",
        "of domains with images of their own to judge on: where classes arrive no output means a class before it is "
        "learnt: its accuracy is then 0 and FWT -1/C, whatever the learner",
    ),
    Alias("acc/new", "accuracy of the new task", "a[i][i], task i just learnt"),
    Alias("acc/task_aware", "task-IL accuracy", "as acc/seen, only the classes of the image's own task competing"),
    Alias(
        "acc/task_identity", "task inference accuracy", "images whose predicted class lies in their task / all images"
    ),
)
"""The field's names with formulas: ``a[i][j]`` as above but from 1; T tasks, C classes. `inflora metrics` has them."""
