"""The stream of tasks: class order, tasks, and the split into training and validation images."""

import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from inflora.config import ConfigError, DataSettings
from inflora.data import ensure_store
from inflora.data.store import Images, open_split, read_manifest

EvaluateOn = Literal["validation", "test"]


@dataclass(frozen=True)
class Task:
    """One task: its classes (new labels ``first_label``...) and its rows in the stream's images."""

    index: int
    first_label: int
    classes: tuple[str, ...]
    train_rows: Tensor
    eval_rows: Tensor


class Stream(NamedTuple):
    """Tasks in order, with labels renumbered in class order.

    ``split_hash`` identifies the division into training and validation images.
    ``train`` and ``evaluate`` hold all tasks' images (memory-mapped, uint8); tasks name rows of them.
    """

    tasks: tuple[Task, ...]
    train: Images
    evaluate: Images
    class_order: tuple[int, ...]
    split_hash: str

    def merged(self) -> "Stream":
        """The same images as one single task: what joint training sees."""
        whole = Task(
            index=0,
            first_label=0,
            classes=tuple(name for task in self.tasks for name in task.classes),
            train_rows=torch.cat([task.train_rows for task in self.tasks]),
            eval_rows=torch.cat([task.eval_rows for task in self.tasks]),
        )
        return self._replace(tasks=(whole,))


def make_stream(settings: DataSettings, evaluate_on: EvaluateOn) -> Stream:
    """Open a dataset as a stream of tasks.

    With ``evaluate_on`` "validation" the test split is not opened, not even looked at.

    Raises:
        ConfigError: The classes cannot be divided into the tasks, or the settings would evaluate on training images.
        DataError: The store cannot be read.
    """
    folder = ensure_store(settings.dataset, settings.root)
    classes = read_manifest(folder).classes
    check_tasks(settings, len(classes))
    train = open_split(folder, "train")
    train_rows, held_out_rows = split_validation(train.labels, settings.validation, settings.split_seed)
    split_hash = rows_hash(train_rows, held_out_rows)
    if evaluate_on == "validation":
        if settings.train_on != "train":
            raise ConfigError(
                f"data.train_on={settings.train_on} leaves no validation images to evaluate on; "
                "set data.train_on=train or evaluate on test"
            )
        evaluate, eval_rows = train, held_out_rows
    else:
        evaluate = open_split(folder, "test")
        eval_rows = torch.arange(len(evaluate.labels))
    if settings.train_on == "train+validation":
        train_rows = torch.arange(len(train.labels))
    order = class_order(len(classes), settings.order_seed)
    rank_of = torch.empty(len(order), dtype=torch.int64)
    rank_of[torch.tensor(order)] = torch.arange(len(order))
    train, evaluate = (Images(images.pixels, rank_of[images.labels]) for images in (train, evaluate))
    size = len(order) // settings.tasks
    tasks = tuple(
        Task(
            index=index,
            first_label=index * size,
            classes=tuple(classes[order[label]] for label in range(index * size, (index + 1) * size)),
            train_rows=_rows_of_labels(train.labels, train_rows, index * size, size),
            eval_rows=_rows_of_labels(evaluate.labels, eval_rows, index * size, size),
        )
        for index in range(settings.tasks)
    )
    return Stream(tasks, train, evaluate, order, split_hash)


def check_tasks(settings: DataSettings, classes: int) -> None:
    """Raise ConfigError unless ``classes`` classes can be cut into ``data.tasks`` equal tasks."""
    if classes % settings.tasks:
        divisors = [n for n in range(1, classes + 1) if classes % n == 0]
        raise ConfigError(
            f"data.tasks must divide the {classes} classes of {settings.dataset} "
            f"({', '.join(map(str, divisors))}), got {settings.tasks}"
        )


def class_order(classes: int, seed: int | None) -> tuple[int, ...]:
    """Original labels in the order they are learnt; natural when ``seed`` is None."""
    if seed is None:
        return tuple(range(classes))
    return tuple(torch.randperm(classes, generator=torch.Generator().manual_seed(seed)).tolist())


def split_validation(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows for training and rows held out: ``fraction`` of every class, at least one of each kind.

    Raises:
        ConfigError: A class has fewer than two images.
    """
    generator = torch.Generator().manual_seed(seed)
    train, held_out = [], []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0]
        if len(rows) < 2:
            raise ConfigError(f"class {label} has {len(rows)} training image; a validation split needs two")
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        held_out.append(shuffled[:count])
        train.append(shuffled[count:])
    return torch.cat(train).sort().values, torch.cat(held_out).sort().values


def rows_hash(*groups: Tensor) -> str:
    """Identity of a split: a hash over which rows are in which group."""
    digest = hashlib.sha256()
    for rows in groups:
        digest.update(len(rows).to_bytes(8, "little"))
        digest.update(rows.to(torch.int64).sort().values.numpy().tobytes())
    return digest.hexdigest()[:16]


def _rows_of_labels(labels: Tensor, rows: Tensor, first: int, size: int) -> Tensor:
    chosen = labels[rows]
    return rows[(chosen >= first) & (chosen < first + size)]
