"""A whole run: task after task, one result each. Whoever wants to know iterates."""

import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import NamedTuple

import torch

from inflora.backbone import backbone_hash, build_backbone, meta_backbone, shape_of
from inflora.config import ConfigError, RunConfig, config_hash
from inflora.data import ensure_store
from inflora.data.loader import Input, seeded, training_batches
from inflora.data.store import read_manifest
from inflora.data.stream import EvaluateOn, Stream, make_stream, task_sizes
from inflora.methods import Method, TaskData, make_method
from inflora.metrics import accuracy_row, metrics_after
from inflora.model import ContinualModel
from inflora.state import RunState, StateError
from inflora.training import EpochDone, evaluate, train_task


class TaskResult(NamedTuple):
    """What is known when a task is done.

    ``metrics`` are those of ``inflora.metrics`` (final ones only after the last task), ``accuracies`` the task's row
    of the accuracy matrix, ``state`` all that is needed to go on from here.
    """

    task: int
    classes: tuple[str, ...]
    metrics: dict[str, float]
    accuracies: list[float]
    losses: list[float]
    seconds: float
    state: RunState


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
        StateError: ``state`` belongs to another run.
    """
    check(config)
    device = pick_device(config.device)
    method = make_method(config.method)
    stream = method.arrange(make_stream(config.data, evaluate_on)).at_home_on(device)
    backbone = build_backbone(config.backbone)
    fresh = RunState(config_hash(config), backbone_hash(backbone), evaluate_on, len(stream.tasks))
    state = state or fresh
    if state[:3] != fresh[:3]:
        raise StateError(
            f"the saved state belongs to run {state.config_hash} on {state.evaluate_on}, this is {fresh.config_hash} "
            f"on {evaluate_on} (backbones {state.backbone_hash} and {fresh.backbone_hash}); start in an empty folder"
        )
    shape = shape_of(backbone)
    input = Input(config.data, shape.image_size, shape.channels, device)
    model = ContinualModel(backbone, shape.width)
    method.prepare(model)
    model.load_learnt_state(state.model)
    method.load_state(state.method)
    model.to(device)
    for index in range(state.tasks_done, len(stream.tasks)):
        start = time.perf_counter()
        losses = _learn(model, method, stream, index, config, input, on_epoch)
        evaluation = evaluate(model, stream, stream.tasks[: index + 1], input)
        evaluations = (*state.evaluations, evaluation)
        state = state._replace(evaluations=evaluations, model=model.learnt_state(), method=method.state())
        yield TaskResult(
            task=index,
            classes=stream.tasks[index].classes,
            metrics=metrics_after(evaluations, state.tasks),
            accuracies=accuracy_row(evaluation),
            losses=losses,
            seconds=time.perf_counter() - start,
            state=state,
        )


def _learn(
    model: ContinualModel,
    method: Method,
    stream: Stream,
    index: int,
    config: RunConfig,
    input: Input,
    on_epoch: Callable[[EpochDone], None],
) -> list[float]:
    """The three moments of one task."""
    task, optim = stream.tasks[index], config.optim.of_task(index)

    def passes(purpose: str) -> Iterator:
        generator = seeded(config.seed, index, purpose)
        return training_batches(stream.train, task.train_rows, input, optim.batch_size, generator)

    data = TaskData(task, len(stream.tasks), config.seed, passes)
    model.add_head(len(task.classes), optim.head_init, seeded(config.seed, index, "head"))
    method.begin_task(model, data)
    losses = train_task(model, method, task, optim, passes, on_epoch)
    method.end_task(model, data)
    return losses


def check(config: RunConfig) -> None:
    """Raise ConfigError unless the settings fit each other, the dataset and the backbone; nothing heavy is loaded."""
    backbone = meta_backbone(config.backbone)
    shape = shape_of(backbone)
    rank = getattr(config.method, "rank", 1)
    if rank > shape.width:
        raise ConfigError(f"method.rank must be at most the backbone's width {shape.width}, got {rank}")
    make_method(config.method).prepare(ContinualModel(backbone, shape.width))
    total_tasks = getattr(config.method, "total_tasks", None)
    tasks = config.data.task_count
    if total_tasks is not None and total_tasks < tasks:
        raise ConfigError(f"method.total_tasks must be at least the {tasks} tasks of data.tasks, got {total_tasks}")
    resize = config.data.eval_resize
    if resize is not None and resize < shape.image_size:
        raise ConfigError(f"data.eval_resize must be at least the input's side {shape.image_size}, got {resize}")
    manifest = read_manifest(ensure_store(config.data.dataset, config.data.root))
    task_sizes(config.data, manifest)
    if manifest.channels not in (1, shape.channels):
        raise ConfigError(
            f"{config.data.dataset} has {manifest.channels} channels, "
            f"backbone {config.backbone.name} reads {shape.channels}"
        )
    pick_device(config.device)


def pick_device(name: str) -> torch.device:
    """The device that ``config.device`` names; "auto" is CUDA where there is one.

    Raises:
        ConfigError: CUDA is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device must be auto or cpu here: no CUDA device is available, got cuda")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def identity(config: RunConfig) -> dict[str, str]:
    """What a run's numbers depend on besides its settings: recorded with every result."""
    stream = make_stream(config.data.model_copy(update={"train_on": "train"}), "validation")
    manifest = read_manifest(ensure_store(config.data.dataset, config.data.root))
    packages = ("torch", "timm", "inflora-sweeps")
    return {
        "config_hash": config_hash(config),
        "dataset": config.data.dataset,
        "dataset_hash": manifest.content_hash,
        "class_order": ",".join(map(str, stream.class_order)),
        "split_hash": stream.split_hash,
        "backbone_hash": backbone_hash(build_backbone(config.backbone)),
        "seed": str(config.seed),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }
