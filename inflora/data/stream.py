"""The stream of tasks: class order, tasks, and the split into training and validation images."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from inflora.config import ConfigError, DataSettings, pycil_seed
from inflora.data import ensure_store
from inflora.data.manifest import Manifest, read_manifest
from inflora.data.store import Images, open_split
from inflora.data.tasks import check_tasks, task_sizes, tasks_in_numbers

EvaluateOn = Literal["validation", "test"]


@dataclass(frozen=True)
class Task:
    """One task: its labels (``first_label``...) with their class names, and its rows in the stream's images."""

    index: int
    first_label: int
    classes: tuple[str, ...]
    train_rows: Tensor
    eval_rows: Tensor


class Stream(NamedTuple):
    """Tasks in order, with labels renumbered in the order they are learnt.

    Every task has labels, and so classifier outputs, of its own; ``class_of`` (labels) says which class each means:
    another one for every label when classes arrive, the same ones again in every task when domains do.
    ``split_hash`` identifies the division into training and validation images.
    ``train`` and ``evaluate`` hold all tasks' images (memory-mapped, uint8); tasks name rows of them. ``manifest`` is
    that of the store they come from. ``shared_test``: all tasks are evaluated on the same images, of domains that none
    of them learns (CORe50); the labels of ``evaluate`` are then those of the first task.
    """

    tasks: tuple[Task, ...]
    train: Images
    evaluate: Images
    class_of: Tensor
    class_order: tuple[int, ...]
    split_hash: str
    manifest: Manifest
    shared_test: bool = False

    def merged(self) -> "Stream":
        """The same images as one single task: joint training."""
        classes = dict(zip(self.class_of.tolist(), [name for task in self.tasks for name in task.classes], strict=True))
        whole = Task(
            index=0,
            first_label=0,
            classes=tuple(classes[label] for label in range(len(classes))),
            train_rows=torch.cat([task.train_rows for task in self.tasks]),
            eval_rows=self.rows_to_evaluate(self.tasks),
        )
        train, evaluate = (
            images._replace(labels=self.class_of[images.labels]) for images in (self.train, self.evaluate)
        )
        names = torch.arange(len(classes))
        return self._replace(tasks=(whole,), train=train, evaluate=evaluate, class_of=names, shared_test=False)

    def rows_to_evaluate(self, tasks: Sequence[Task]) -> Tensor:
        """The rows of ``evaluate`` that some tasks are evaluated on, each once."""
        return tasks[0].eval_rows if self.shared_test else torch.cat([task.eval_rows for task in tasks])

    def resident_on(self, device: torch.device) -> "Stream":
        """The same stream with its images kept on the device, where they fit there easily."""
        train = self.train._replace(pixels=self.train.pixels.resident_on(device))
        same = self.evaluate.pixels is self.train.pixels
        evaluate = train.pixels if same else self.evaluate.pixels.resident_on(device)
        return self._replace(train=train, evaluate=self.evaluate._replace(pixels=evaluate))


def make_stream(settings: DataSettings, evaluate_on: EvaluateOn) -> Stream:
    """Open a dataset as a stream of tasks.

    With ``evaluate_on`` "validation" the test split is not opened, not even looked at.

    Raises:
        ConfigError: The classes cannot be divided into the tasks, a task is left without images, or the settings would
            evaluate on training images.
        DataError: The store cannot be read.
    """
    folder = ensure_store(settings.dataset, settings.root)
    manifest = read_manifest(folder)
    check_tasks(settings, manifest)
    settings = settings.model_copy(update={"tasks": tasks_in_numbers(settings, manifest)})
    # Joint training cuts the stream too, and merges it again: its validation images are then those of the tasks.
    sizes = task_sizes(settings.model_copy(update={"joint": False}), len(manifest.classes))
    train = open_split(folder, "train")
    kinds = train.labels if settings.scenario == "class" else train.domains * len(manifest.classes) + train.labels
    train_rows, held_out_rows = split_validation(kinds, settings.validation, settings.split_seed)
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
    # What arrives task by task, classes or domains, arrives in this order.
    arriving = manifest.domains if settings.scenario == "domain" else manifest.classes
    order = class_order(len(arriving), settings.order_seed, settings.order)
    place = torch.empty(len(order), dtype=torch.int64)
    place[torch.tensor(order)] = torch.arange(len(order))
    classes = len(manifest.classes)

    shared_test = settings.scenario == "domain" and evaluate_on == "test" and bool(manifest.test_domains)

    def renumbered(images: Images) -> Images:
        if settings.scenario == "domain":
            return images._replace(labels=place[images.domains] * classes + images.labels)
        return images._replace(labels=place[images.labels])

    if settings.scenario == "domain":
        names = manifest.classes * len(order)
        class_of = torch.arange(classes).repeat(len(order))
    else:
        names = [manifest.classes[label] for label in order]
        class_of = torch.arange(classes)
    train, evaluate = renumbered(train), evaluate if shared_test else renumbered(evaluate)
    starts = [0, *accumulate(sizes)]
    tasks = tuple(
        Task(
            index=index,
            first_label=first,
            classes=tuple(names[first : first + size]),
            train_rows=_rows_of_labels(train.labels, train_rows, first, size),
            eval_rows=eval_rows if shared_test else _rows_of_labels(evaluate.labels, eval_rows, first, size),
        )
        for index, (first, size) in enumerate(zip(starts, sizes, strict=False))
    )
    for task in tasks:
        for rows, images in ((task.train_rows, "training"), (task.eval_rows, "evaluation")):
            if not len(rows):
                held = ", ".join(task.classes)[:100]
                raise ConfigError(
                    f"task {task.index} of data.tasks ({held}) has no {images} images in {settings.dataset}"
                )
    stream = Stream(tasks, train, evaluate, class_of, order, split_hash, manifest, shared_test)
    return stream.merged() if settings.joint else stream


def class_order(classes: int, seed: int | None, order: str | None = None) -> tuple[int, ...]:
    """Classes (or domains) in the order they are learnt; natural when both ``seed`` and ``order`` are None."""
    if order is not None:
        # NumPy's legacy generator, which stays as it is: published class orders were drawn from it.
        return tuple(np.random.RandomState(pycil_seed(order)).permutation(classes).tolist())
    if seed is None:
        return tuple(range(classes))
    return tuple(torch.randperm(classes, generator=torch.Generator().manual_seed(seed)).tolist())


def split_validation(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows for training and rows held out: ``fraction`` of every class, at least one of each kind.

    The only image of a class is for training.
    """
    generator = torch.Generator().manual_seed(seed)
    train, held_out = [], []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0]
        # Class by class: a plain random split may leave a rare class without a validation image.
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        held_out.append(shuffled[:count])
        train.append(shuffled[count:])
    return torch.cat(train).sort().values, torch.cat(held_out).sort().values


def rows_hash(*groups: Tensor) -> str:
    """Identity of a split: a hash over which rows are in which group."""
    digest = hashlib.sha256()
    for rows in groups:
        # The length keeps groups apart: the same rows divided elsewhere must hash to something else.
        digest.update(len(rows).to_bytes(8, "little"))
        digest.update(rows.to(torch.int64).sort().values.numpy().tobytes())
    return digest.hexdigest()[:16]


def _rows_of_labels(labels: Tensor, rows: Tensor, first: int, size: int) -> Tensor:
    chosen = labels[rows]
    return rows[(chosen >= first) & (chosen < first + size)]
