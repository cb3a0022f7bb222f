"""One training of an adapter, and every classifier on its features.

While an adapter learns, every classifier trains the same linear layer of a task's classes. So the adapter learns the
same whatever the classifier is, and one training shows what all of them would.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import nn

from inflora.adapters import make_adapter
from inflora.backbone import meta_backbone, shape_of
from inflora.classifiers import Classifier, make_classifier
from inflora.classifiers.linear import LinearHeads
from inflora.config import RunConfig, override
from inflora.continual import run
from inflora.data.loader import InputFormat, evaluation_batches
from inflora.data.stream import EvaluateOn, make_stream
from inflora.draws import Draws
from inflora.features import Features, features_of
from inflora.metrics import Evaluation, accuracy_row, metrics_after
from inflora.model import ContinualModel
from inflora.task_data import TaskData
from inflora.training import RightAnswers


class Fit(NamedTuple):
    """A classifier on its way through the stream, what it got right after each task, and the seconds that it took."""

    classifier: Classifier[Any]
    evaluations: list[Evaluation]
    seconds: list[float]


def shown_by(
    config: RunConfig, evaluate_on: EvaluateOn, labelled: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """Label of each classifier -> what a whole run with it shows: metrics, and ``seconds`` of a task for itself alone.

    One run with linear heads trains the adapter; all classifiers are fitted to its features. The label "" has seconds
    of a task: ``training`` the adapter, and looking at its images as they are, the ``pass`` that every fit needs.
    """
    stream = make_stream(config.data, evaluate_on)
    shape = shape_of(meta_backbone(config.backbone))
    input_format = InputFormat(config.data, shape.image_size, shape.channels, torch.device("cpu"))
    adapter, total = make_adapter(config.adapter), len(stream.tasks)
    spent: dict[str, list[float]] = {"training": [], "pass": [], "evaluation": []}
    fits: dict[str, Fit] = {}
    before: dict[int, Features] = {}

    def data_of(task: int) -> TaskData:
        optim = config.optim.of_task(task)
        return TaskData(stream.tasks[task], total, stream.train, input_format, optim, Draws(config.seed))

    results = run(config, evaluate_on=evaluate_on)
    for task in range(total):
        with timed(spent["training"]):
            result = next(results)
        model, data, seen_tasks = result.model, data_of(task), stream.tasks[: task + 1]
        fits = fits or {
            label: Fit(classifier_of(config, settings, model), [], []) for label, settings in labelled.items()
        }
        looks = sorted({0} | {fit.classifier.views for fit in fits.values()})
        looking: dict[int, list[float]] = {views: [] for views in looks}
        seen: dict[int, Features] = {}
        for views in looks:
            with timed(looking[views]):
                seen[views] = features_of(model, data, views)
        spent["pass"] += looking[0]
        with timed(spent["evaluation"]), torch.no_grad():
            rows = torch.cat([each.eval_rows for each in seen_tasks])
            batches = list(evaluation_batches(stream.evaluate, rows, input_format, 256))
            evaluated = torch.cat([model.features(batch.images) for batch in batches])
        for classifier, evaluations, seconds in fits.values():
            with timed(seconds):
                learn(
                    classifier, model.classifier.heads[-1], data, seen[classifier.views], before.get(classifier.views)
                )
            seconds[-1] += looking[classifier.views][0] - looking[0][0]
            answers = RightAnswers(stream, seen_tasks, input_format.device)
            with torch.no_grad():
                answers.count(classifier(evaluated), torch.cat([batch.labels for batch in batches]))
            evaluations.append(answers.evaluation())
        moves = task + 1 < total and adapter.adapts(task + 1)
        before = {views: features_of(model, data_of(task + 1), views) for views in looks} if moves else {}
    # The run has evaluated as well, after each task.
    per_task = {"training": fmean(spent["training"]) - fmean(spent["evaluation"]), "pass": fmean(spent["pass"])}
    return {"": per_task} | {label: shown_of(fit, total) for label, fit in fits.items()}


def classifier_of(config: RunConfig, settings: Mapping[str, Any], model: ContinualModel) -> Classifier[Any]:
    """The classifier of ``settings`` before its first task, for the features of ``model``."""
    return make_classifier(override(config, {"classifier": settings}).classifier, model.width)


def learn(
    classifier: Classifier[Any], trained_head: nn.Module, data: TaskData, seen: Features, before: Features | None
) -> None:
    """Do what a run does with a classifier when a task has been trained, the head of its classes being given."""
    classifier.begin_task(data)
    if isinstance(classifier, LinearHeads):
        classifier.heads[-1].load_state_dict(trained_head.state_dict())
    if classifier.is_fitted:
        classifier.fit(seen, before if classifier.follows_drift else None, data)


def shown_of(fit: Fit, tasks: int) -> dict[str, float]:
    """The metrics of a whole run, and seconds of a task."""
    new = fmean(accuracy_row(evaluation)[-1] for evaluation in fit.evaluations)
    return metrics_after(fit.evaluations, tasks) | {"acc/new_mean": new, "seconds": fmean(fit.seconds)}


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Add the processor time of what is done meanwhile: another program on the machine does not count."""
    start = time.process_time()
    yield
    seconds.append(time.process_time() - start)
