"""One training of an adapter, and every classifier on its features.

While an adapter learns, every classifier trains the same linear layer of a task's classes. So the adapter learns the
same whatever the classifier is, and one training shows what all of them would.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from typing import Any, NamedTuple

import torch
from frozen_features import FrozenFeatures
from torch import nn

from inflora.classifiers import Classifier, make_classifier
from inflora.classifiers.linear import LinearHeads
from inflora.config import RunConfig, override
from inflora.data.loader import evaluation_batches
from inflora.data.stream import EvaluateOn
from inflora.features import Features, features_of
from inflora.metrics import Evaluation, accuracy_row, metrics_after
from inflora.model import ContinualModel
from inflora.right_answers import RightAnswers
from inflora.setup import Setup, set_up
from inflora.task_data import TaskData
from inflora.training import train_task


class Fit(NamedTuple):
    """A classifier on its way through the stream, what it got right after each task, and the seconds that it took."""

    classifier: Classifier[Any]
    evaluations: list[Evaluation]
    seconds: list[float]


class Look(NamedTuple):
    """Features of a task's images, and the seconds that it took to see them."""

    features: Features
    seconds: float


Looks = Mapping[int, Look]
"""Number of augmented views -> what is seen with them."""


def shown_by(
    config: RunConfig,
    evaluate_on: EvaluateOn,
    labelled: Mapping[str, Mapping[str, Any]],
    memory: FrozenFeatures | None = None,
) -> dict[str, dict[str, float]]:
    """Label of each classifier -> what a whole run with it shows: metrics, and ``seconds`` of a task for itself alone.

    A run with linear heads, but without its evaluation, trains the adapter; all classifiers are fitted to its features.
    Their ``seconds`` have the passes over the task's images in them that they need, of the label "" they are those of
    the task's training.
    """
    setup = set_up(config, None, evaluate_on)
    model, adapter, stream, input_format, draws, _ = setup
    memory = memory or FrozenFeatures()
    memory.watch(model, adapter.adapts(0))
    fits = {label: Fit(classifier_of(config, settings, model), [], []) for label, settings in labelled.items()}
    fitted = [fit.classifier for fit in fits.values() if fit.classifier.is_fitted]
    seconds: list[float] = []
    for task in stream.tasks:
        optim = config.optim.of_task(task.index)
        data = TaskData(task, len(stream.tasks), stream.train, input_format, optim, draws)
        moves = task.index > 0 and adapter.adapts(task.index)
        before = looks(model, data, memory, {each.views for each in fitted if moves and each.follows_drift})
        with timed(seconds, memory):
            model.classifier.begin_task(data)
            adapter.begin_task(model, data)
            train_task(model, adapter, data, lambda _: None)
            adapter.end_task(model, data)
        seen = looks(model, data, memory, {each.views for each in fitted})
        for fit in fits.values():
            with timed(fit.seconds, memory):
                passes = learn(fit.classifier, model.classifier.heads[-1], data, seen, before)
            fit.seconds[-1] += passes
        evaluate(setup, task.index + 1, list(fits.values()))
    memory.keep()
    return {"": {"seconds": fmean(seconds)}} | {label: shown_of(fit, len(stream.tasks)) for label, fit in fits.items()}


def looks(model: ContinualModel, data: TaskData, memory: FrozenFeatures, several: set[int]) -> Looks:
    """Look at the task's images with each number of views."""
    seen = {}
    for views in several:
        seconds: list[float] = []
        with timed(seconds, memory):
            features = features_of(model, data, views)
        seen[views] = Look(features, *seconds)
    return seen


@torch.no_grad()
def evaluate(setup: Setup, tasks: int, fits: list[Fit]) -> None:
    """Count what each classifier gets right on the images of the first ``tasks``, which are seen once for all."""
    seen = setup.stream.tasks[:tasks]
    rows = torch.cat([task.eval_rows for task in seen])
    batches = list(evaluation_batches(setup.stream.evaluate, rows, setup.input_format, 256))
    features, labels = (
        torch.cat([setup.model.features(batch.images) for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
    )
    for fit in fits:
        answers = RightAnswers(setup.stream, seen, setup.input_format.device)
        answers.count(fit.classifier(features), labels)
        fit.evaluations.append(answers.evaluation())


def classifier_of(config: RunConfig, settings: Mapping[str, Any], model: ContinualModel) -> Classifier[Any]:
    """The classifier of ``settings`` before its first task, for the features of ``model``."""
    return make_classifier(override(config, {"classifier": settings}).classifier, model.width)


def learn(classifier: Classifier[Any], trained_head: nn.Module, data: TaskData, seen: Looks, before: Looks) -> float:
    """Do what a run does with a classifier when a task has been trained, the head of its classes being given.

    Returns the seconds of the looks that it needs.
    """
    classifier.begin_task(data)
    if isinstance(classifier, LinearHeads):
        classifier.heads[-1].load_state_dict(trained_head.state_dict())
    if not classifier.is_fitted:
        return 0.0
    after, earlier = seen[classifier.views], before.get(classifier.views) if classifier.follows_drift else None
    classifier.fit(after.features, earlier.features if earlier else None, data)
    return after.seconds + (earlier.seconds if earlier else 0.0)


def shown_of(fit: Fit, tasks: int) -> dict[str, float]:
    """The metrics of a whole run, and seconds of a task."""
    new = fmean(accuracy_row(evaluation)[-1] for evaluation in fit.evaluations)
    return metrics_after(fit.evaluations, tasks) | {"acc/new_mean": new, "seconds": fmean(fit.seconds)}


@contextmanager
def timed(seconds: list[float], memory: FrozenFeatures) -> Iterator[None]:
    """Add the seconds of what is done meanwhile, by the clock of the ``memory``."""
    start = memory.clock()
    yield
    seconds.append(memory.clock() - start)
