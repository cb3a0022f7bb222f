"""The epochs of one task, and evaluation on every class seen."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inflora import distributed
from inflora.config import OptimSettings
from inflora.data.loader import Batch, Input, evaluation_batches
from inflora.data.stream import Stream, Task
from inflora.methods import Method
from inflora.methods.base import Trainable
from inflora.metrics import Evaluation, TaskCounts
from inflora.model import ContinualModel
from inflora.precision import float32_products

_EVALUATION_BATCH = 256


class EpochDone(NamedTuple):
    """Where a run is: for progress displays."""

    task: int
    epoch: int
    epochs: int
    loss: float
    data_wait: float  # share of the epoch's time in which nothing could be computed for want of images


def lr_factor(settings: OptimSettings, epoch: int) -> float:
    """Learning rate of ``epoch`` (from 0) as a share of the full one, as in the authors' experiments.

    "cosine" is half a cosine with SGD; with Adam almost a quarter of one, whose first two epochs are both at the full
    rate. "step" multiplies by ``decay`` at every milestone.
    """
    epochs = settings.epochs
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "step":
        return settings.decay ** sum(epoch >= milestone for milestone in settings.milestones)
    if settings.name == "sgd":
        return (1 + math.cos(math.pi * epoch / epochs)) / 2
    if epochs == 1:
        return 1.0
    return math.cos(99 * math.pi * max(epoch - 1, 0) / (200 * (epochs - 1)))


def make_optimizer(trainable: Trainable, settings: OptimSettings) -> torch.optim.Optimizer:
    """A fresh optimiser over what the task trains and nothing else, so that nothing else is decayed either."""
    groups = [
        {"params": trainable.classifier, "lr": settings.head_lr or settings.lr},
        {"params": trainable.adapted, "lr": settings.lr},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, weight_decay=settings.weight_decay)
    return torch.optim.Adam(groups, weight_decay=settings.weight_decay)


def train_task(
    model: ContinualModel,
    method: Method[Any],
    task: Task,
    settings: OptimSettings,
    passes: Callable[[str], Iterator[Batch]],
    on_epoch: Callable[[EpochDone], None],
) -> list[list[float]]:
    """All epochs of one task; the loss of each global batch, epoch by epoch (none where nothing is trained).

    Raises:
        FloatingPointError: The loss is no longer a finite number.
    """
    trainable = method.trainable(model)
    if not trainable.size:
        return []
    optimizer = make_optimizer(trainable, settings)
    full_lrs = [group["lr"] for group in optimizer.param_groups]
    step_losses = []
    for epoch in range(settings.epochs):
        for group, full_lr in zip(optimizer.param_groups, full_lrs, strict=True):
            group["lr"] = full_lr * lr_factor(settings, epoch)
        start = time.perf_counter()
        losses, waited = train_epoch(model, method, task, optimizer, trainable, passes(f"train-{epoch}"))
        loss = fmean(losses)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of task {task.index}, epoch {epoch} is {loss}; try a smaller optim.lr")
        step_losses.append(losses)
        data_wait = waited / (time.perf_counter() - start)
        on_epoch(EpochDone(task.index, epoch + 1, settings.epochs, loss, data_wait))
    return step_losses


class EpochLosses(NamedTuple):
    """The loss of each global batch of an epoch, and for how many seconds the device waited for images."""

    losses: list[float]
    waited: float


def train_epoch(
    model: ContinualModel,
    method: Method[Any],
    task: Task,
    optimizer: torch.optim.Optimizer,
    trainable: Trainable,
    batches: Iterable[Batch],
) -> EpochLosses:
    """One update for each batch. The host waits for the device once, at the end, for the losses of all of them."""
    parts, waits = [], []
    for batch in batches:
        parts.append(train_step(model, method, task, optimizer, trainable, batch))
        waits.append(batch.waited)
    losses = distributed.all_sum(torch.stack(parts)).tolist()
    return EpochLosses(losses, sum(waited() for waited in waits))


def train_step(
    model: ContinualModel,
    method: Method[Any],
    task: Task,
    optimizer: torch.optim.Optimizer,
    trainable: Trainable,
    batch: Batch,
) -> Tensor:
    """One update; this worker's part of the global batch's mean loss."""
    optimizer.zero_grad()
    if batch.share:
        loss = method.loss(model, batch, task) * batch.share
        with float32_products(model.precision):
            loss.backward()
    else:
        loss = torch.zeros((), device=batch.images.device)
    distributed.sum_gradients((*trainable.classifier, *trainable.adapted))
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def evaluate(
    model: ContinualModel,
    stream: Stream,
    tasks: Sequence[Task],
    input: Input,
    on_features: Callable[[Tensor, Tensor], None] = lambda places, features: None,
) -> Evaluation:
    """Count right answers on the images of the stream's first ``tasks``, all classes they have together competing.

    Every image is looked at once; ``on_features`` is given each batch's features (B x D), with the places (B) of its
    images among all that are evaluated.

    Raises:
        FloatingPointError: The model's answers are no longer finite numbers.
    """
    counts = torch.zeros(len(tasks), 5, dtype=torch.int64, device=input.device)
    first_labels = torch.tensor([task.first_label for task in tasks], device=input.device)
    class_of = stream.class_of.to(input.device)
    rows = torch.cat([task.eval_rows for task in tasks])
    places = torch.arange(len(rows), device=input.device)[distributed.rank() :: distributed.world_size()]
    classes = torch.arange(model.classes, device=input.device)
    class_tasks = torch.bucketize(classes, first_labels, right=True) - 1
    for batch in evaluation_batches(stream.evaluate, rows, input, _EVALUATION_BATCH):
        features = model.features(batch.images)
        here, places = places.tensor_split([len(features)])
        on_features(here, features)
        logits = model.logits(features)
        label_tasks = torch.bucketize(batch.labels, first_labels, right=True) - 1
        predicted = logits.argmax(1)
        own = logits.masked_fill(class_tasks[None, :] != label_tasks[:, None], -math.inf).argmax(1)
        hits = torch.stack(
            [
                torch.ones_like(predicted),
                (class_of[predicted] == class_of[batch.labels]).long(),
                (own == batch.labels).long(),
                (class_tasks[predicted] == label_tasks).long(),
                (~torch.isfinite(logits)).any(1).long(),
            ],
            dim=1,
        )
        counts.index_add_(0, label_tasks, hits)
    # The host waits once, when all has been computed, and all workers hear of what one of them has seen.
    *hits_of_tasks, broken = zip(*distributed.all_sum(counts).tolist(), strict=True)
    if any(broken):
        raise FloatingPointError(f"the logits after task {tasks[-1].index} are not finite; try a smaller optim.lr")
    return tuple(
        TaskCounts(images=images, correct=correct, correct_in_task=in_task, right_task=right_task)
        for images, correct, in_task, right_task in zip(*hits_of_tasks, strict=True)
    )
