"""The epochs of one task, and evaluation on every class seen."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inflora import distributed
from inflora.adapters import Adapter
from inflora.config import OptimSettings
from inflora.data.loader import Batch, InputFormat, evaluation_batches
from inflora.data.stream import Stream, Task
from inflora.metrics import Evaluation
from inflora.model import ContinualModel
from inflora.precision import float32_products
from inflora.right_answers import RightAnswers
from inflora.task_data import TaskData

_EVALUATION_BATCH = 256


class EpochDone(NamedTuple):
    """An epoch's end, for progress displays."""

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


class Trainable(NamedTuple):
    """The parameters that a task trains: its classifier's, and its adapter's; ``rates`` are those of their own."""

    classifier: list[nn.Parameter]
    adapter: list[nn.Parameter]
    rates: dict[nn.Parameter, float]

    @property
    def size(self) -> int:
        """The count of numbers in them: ``params/trainable``."""
        return sum(parameter.numel() for parameter in (*self.classifier, *self.adapter))


def trainable(model: ContinualModel, adapter: Adapter[Any]) -> Trainable:
    """The parameters that the task that has begun trains; nothing else changes."""
    adapted = adapter.task_parameters(model)
    alone = not adapted and not model.classifier.trained_alone
    return Trainable([] if alone else model.classifier.task_parameters(), adapted, adapter.own_rates(model))


def make_optimizer(trained: Trainable, settings: OptimSettings) -> torch.optim.Optimizer:
    """A fresh optimiser over the parameters that the task trains, so that nothing else is decayed either."""
    parts = [(trained.classifier, settings.head_lr or settings.lr)]
    for rate in dict.fromkeys([settings.lr, *trained.rates.values()]):
        parts.append(([p for p in trained.adapter if trained.rates.get(p, settings.lr) == rate], rate))
    groups = [{"params": parameters, "lr": rate} for parameters, rate in parts if parameters]
    if settings.name == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, weight_decay=settings.weight_decay)
    return torch.optim.Adam(groups, weight_decay=settings.weight_decay)


class Epoch(NamedTuple):
    """One epoch of a task: the loss of each global batch, and the learning rates of classifier and adapter."""

    losses: list[float]
    head_lr: float
    lr: float


def train_task(
    model: ContinualModel, adapter: Adapter[Any], data: TaskData, on_epoch: Callable[[EpochDone], None]
) -> list[Epoch]:
    """Train a task for all its epochs; none where there is nothing to train.

    Raises:
        FloatingPointError: The loss is no longer a finite number.
    """
    trained, settings, task = trainable(model, adapter), data.optim, data.task.index
    if not trained.size:
        return []
    optimizer = make_optimizer(trained, settings)
    full_lrs = [group["lr"] for group in optimizer.param_groups]
    epochs = []
    for epoch in range(settings.epochs):
        factor = lr_factor(settings, epoch)
        for group, full_lr in zip(optimizer.param_groups, full_lrs, strict=True):
            group["lr"] = full_lr * factor
        start = time.perf_counter()
        losses, waited = train_epoch(model, adapter, data.task, optimizer, trained, data.augmented(f"train-{epoch}"))
        loss = fmean(losses)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of task {task}, epoch {epoch} is {loss}; try a smaller optim.lr")
        epochs.append(Epoch(losses, factor * (settings.head_lr or settings.lr), factor * settings.lr))
        on_epoch(EpochDone(task, epoch + 1, settings.epochs, loss, waited / (time.perf_counter() - start)))
    return epochs


def train_epoch(
    model: ContinualModel,
    adapter: Adapter[Any],
    task: Task,
    optimizer: torch.optim.Optimizer,
    trained: Trainable,
    batches: Iterable[Batch],
) -> tuple[list[float], float]:
    """Take one update for each batch: the loss of each global batch, and the seconds that the device waited for images.

    The host waits for the device once, at the end, for the losses of all of them.
    """
    parts, waits = [], []
    for batch in batches:
        parts.append(train_step(model, adapter, task, optimizer, trained, batch))
        waits.append(batch.waited)
    losses = distributed.all_sum(torch.stack(parts)).tolist()
    return losses, sum(waited() for waited in waits)


def train_step(
    model: ContinualModel,
    adapter: Adapter[Any],
    task: Task,
    optimizer: torch.optim.Optimizer,
    trained: Trainable,
    batch: Batch,
) -> Tensor:
    """Take one update; this worker's part of the global batch's mean loss."""
    optimizer.zero_grad()
    # The last batch of a pass may be smaller than the number of workers: some of them have no image then.
    if batch.share:
        loss = batch_loss(model, adapter, task, batch) * batch.share
        with float32_products(model.precision):
            loss.backward()
    else:
        loss = torch.zeros((), device=batch.images.device)
    distributed.sum_gradients((*trained.classifier, *trained.adapter))
    optimizer.step()
    return loss.detach()


def batch_loss(model: ContinualModel, adapter: Adapter[Any], task: Task, batch: Batch) -> Tensor:
    """The classifier's mean loss of a batch, plus what prompts and adapter add."""
    features, penalties = model.encode(batch.images, task.index if adapter.adapts(task.index) else None)
    loss = model.classifier.loss(features, batch.labels, task)
    for penalty in (*penalties, *adapter.penalties(model)):
        loss = loss + penalty
    return loss


@torch.no_grad()
def evaluate(
    model: ContinualModel,
    stream: Stream,
    tasks: Sequence[Task],
    input_format: InputFormat,
    on_features: Callable[[Tensor, Tensor], None] = lambda places, features: None,
) -> Evaluation:
    """Count right answers on the images of the stream's first ``tasks``.

    Every image is looked at once; ``on_features`` is given each batch's features (B x D), with the places (B) of its
    images among all that are evaluated.

    Raises:
        FloatingPointError: The model's answers are no longer finite numbers.
    """
    answers = RightAnswers(stream, tasks, input_format.device)
    rows = stream.rows_to_evaluate(tasks)
    # Images that all tasks share count for each of them, whose outputs for their classes are its own.
    shifts = [task.first_label for task in tasks] if stream.shared_test else [0]
    places = torch.arange(len(rows), device=input_format.device)[distributed.rank() :: distributed.world_size()]
    for batch in evaluation_batches(stream.evaluate, rows, input_format, _EVALUATION_BATCH):
        features = model.features(batch.images)
        here, places = places.tensor_split([len(features)])
        logits = model.classifier(features)
        for turn, shift in enumerate(shifts):
            on_features(here + turn * len(rows), features)
            answers.count(logits, batch.labels + shift)
    return answers.evaluation()
