"""Continual learning, read top to bottom: task after task, one result each. Whoever wants to know iterates."""

import time
from collections.abc import Callable, Iterator
from statistics import fmean
from typing import NamedTuple

from torch import Tensor

from inflora.config import RunConfig
from inflora.data.stream import EvaluateOn
from inflora.drift import Probes, drifts
from inflora.features import features_of
from inflora.forward_transfer import transfer
from inflora.metrics import accuracy_row, task_aware_row
from inflora.model import ContinualModel
from inflora.precision import BITS
from inflora.setup import set_up
from inflora.state import RunState
from inflora.task_data import TaskData
from inflora.training import Epoch, EpochDone, evaluate, train_task, trainable


class TaskResult(NamedTuple):
    """All that is known when a task is done.

    ``metrics`` are those of ``inflora.metrics`` (final ones only after the last task), the adapter's diagnostics,
    ``params/trainable``, ``precision/bits``, ``drift/...`` and what ``inflora.forward_transfer`` knows of domains;
    ``accuracies`` is the task's row of the accuracy matrix,
    ``task_aware`` the same with the task known; ``epochs`` are the losses of every batch and the learning rates;
    ``factors`` the adapters' A and B, which are merged by now (``<layer>.lora_A``, ``<layer>.lora_B``); ``state`` all
    that is needed to go on from here. ``model`` is the live model: the next task changes it.
    """

    task: int
    classes: tuple[str, ...]
    metrics: dict[str, float]
    accuracies: list[float]
    task_aware: list[float]
    epochs: list[Epoch]
    factors: dict[str, Tensor]
    seconds: float
    state: RunState
    model: ContinualModel

    @property
    def step_losses(self) -> list[list[float]]:
        """The mean loss of every global batch, epoch by epoch."""
        return [epoch.losses for epoch in self.epochs]

    @property
    def losses(self) -> list[float]:
        """The mean loss of every epoch."""
        return [fmean(losses) for losses in self.step_losses]


def run(
    config: RunConfig,
    state: RunState | None = None,
    *,
    evaluate_on: EvaluateOn = "validation",
    on_epoch: Callable[[EpochDone], None] = lambda _: None,
) -> Iterator[TaskResult]:
    """Learn the stream's tasks one after another, going on from ``state`` where one is given.

    The test images are opened only with ``evaluate_on`` "test", which is no setting: no config can ask for it.

    Raises:
        ConfigError: Settings that do not fit each other, the data or the backbone.
        StateError: ``state`` belongs to another run, or does not hold what it must.
    """
    model, adapter, stream, input_format, draws, state = set_up(config, state, evaluate_on)
    classifier, total_tasks = model.classifier, len(stream.tasks)
    for task in stream.tasks[state.tasks_done :]:
        start = time.perf_counter()
        optim = config.optim.of_task(task.index)
        data = TaskData(task, total_tasks, stream.train, input_format, optim, draws)

        # The adapter may look at the task's images before it learns them: InfLoRA designs its subspace here.
        classifier.begin_task(data)
        # What is remembered of old classes can follow the features where these images show how they move.
        moves = task.index > 0 and adapter.adapts(task.index)
        before = features_of(model, data, classifier.views) if moves and classifier.follows_drift else None
        adapter.begin_task(model, data)
        trained_size = trainable(model, adapter).size

        epochs = train_task(model, adapter, data, on_epoch)

        # First the adapter: the classifier is fitted to features that stay until the next task.
        factors = adapter.end_task(model, data)
        if classifier.is_fitted:
            classifier.fit(features_of(model, data, classifier.views), before, data)

        # All classes seen so far compete, and a few features are kept to see later how far they have moved.
        seen = stream.tasks[: task.index + 1]
        probes = Probes(seen, model.width, input_format.device)
        evaluation = evaluate(model, stream, seen, input_format, probes.see)
        features = probes.features()

        diagnostics = {"params/trainable": float(trained_size), "precision/bits": float(BITS[model.precision])}
        diagnostics |= adapter.diagnostics() | drifts(state.probes, features)
        diagnostics |= transfer(model, stream, task.index + 1, input_format, state.diagnostics)
        state = state._replace(
            evaluations=(*state.evaluations, evaluation),
            model=model.learnt_state(),
            adapter=adapter.state(),
            classifier=classifier.state(),
            probes=features | state.probes,
            diagnostics=(*state.diagnostics, diagnostics),
        )
        yield TaskResult(
            task=task.index,
            classes=task.classes,
            metrics=state.metrics(task.index + 1),
            accuracies=accuracy_row(evaluation),
            task_aware=task_aware_row(evaluation),
            epochs=epochs,
            factors=factors,
            seconds=time.perf_counter() - start,
            state=state,
            model=model,
        )
