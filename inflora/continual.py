"""A whole run: task after task, one result each. Whoever wants to know iterates."""

import platform
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from inflora.backbone import backbone_hash, build_backbone, meta_backbone, shape_of
from inflora.config import ConfigError, RunConfig, config_hash
from inflora.data import ensure_store
from inflora.data.loader import Batch, Input, evaluation_batches, seeded, training_batches
from inflora.data.order import Given, given_head, ordered_rows
from inflora.data.store import read_manifest
from inflora.data.stream import EvaluateOn, Stream, make_stream, task_sizes
from inflora.drift import Probes, drift
from inflora.integrity import check_state, facts_of
from inflora.methods import Method, TaskData, make_method
from inflora.metrics import accuracy_row
from inflora.model import ContinualModel
from inflora.precision import BITS, pick_precision
from inflora.shared import Shared, keys_of
from inflora.state import RunState, StateError
from inflora.training import EpochDone, evaluate, train_task


class TaskResult(NamedTuple):
    """What is known when a task is done.

    ``metrics`` are those of ``inflora.metrics`` (final ones only after the last task), the method's diagnostics,
    ``params/trainable``, ``precision/bits`` and ``drift/...``; ``accuracies`` is the task's row of the accuracy matrix;
    ``losses`` the mean loss of every epoch and ``step_losses`` that of every batch; ``factors`` the adapters' A and B,
    which are merged by now (``<layer>.lora_A``, ``<layer>.lora_B``); ``state`` all that is needed to go on from here,
    the memory among it.
    ``saved_s`` is the time that results shared with other runs have saved; ``model`` is the live model: the next task
    changes it.
    """

    task: int
    classes: tuple[str, ...]
    metrics: dict[str, float]
    accuracies: list[float]
    losses: list[float]
    step_losses: list[list[float]]
    factors: dict[str, Tensor]
    seconds: float
    saved_s: float
    state: RunState
    model: ContinualModel


def run(
    config: RunConfig,
    state: RunState | None = None,
    *,
    evaluate_on: EvaluateOn = "validation",
    on_epoch: Callable[[EpochDone], None] = lambda _: None,
    shared: Shared | None = None,
) -> Iterator[TaskResult]:
    """Learn the stream's tasks one after another, going on from ``state`` where one is given.

    With ``shared`` what the first task has in common with other runs is computed by one of them, to the same bits.

    The test images are opened only with ``evaluate_on`` "test", which is no setting: no config can ask for it.

    Raises:
        ConfigError: Settings that do not fit each other, the data or the backbone.
        StateError: ``state`` belongs to another run, or does not hold what it must.
    """
    check(config)
    device = pick_device(config.device)
    method = make_method(config.method)
    stream = method.arrange(make_stream(config.data, evaluate_on)).resident_on(device)
    backbone = build_backbone(config.backbone)
    fresh = RunState(
        config_hash(config), backbone_hash(backbone), evaluate_on, len(stream.tasks), data=facts_of(stream)
    )
    if state is None:
        state = fresh
    else:
        _check_goes_on(config, state, fresh)
    shape = shape_of(backbone)
    given = Given.of(config)
    given.check(config, stream, shape.width, method.passes)
    input = Input(config.data, shape.image_size, shape.channels, device)
    model = ContinualModel(backbone, shape.width, pick_precision(config.precision, device, shape.width))
    method.prepare(model)
    model.load_learnt_state(state.model)
    method.load_state(state.method)
    model.settle_on(device)
    if config.compile:
        backbone.compile()
    setup = _Setup(config, model, method, stream, input, given)
    numerics = f"{model.precision} {'compiled' if config.compile else ''}"
    keys = keys_of(config, f"{stream.manifest.content_hash} {stream.split_hash} {fresh.backbone_hash} {numerics}")
    for index in range(state.tasks_done, len(stream.tasks)):
        start = time.perf_counter()
        # What comes from files is in no key: such runs keep to themselves.
        with_others = shared if index == 0 and shared is not None and given == Given() else Shared()
        learnt = _learn(setup, index, on_epoch, with_others, keys)
        seen = stream.tasks[: index + 1]
        watched = Probes(seen, model.width, device)
        evaluation = evaluate(model, stream, seen, input, watched.see)
        probes = watched.features()
        state = state._replace(
            evaluations=(*state.evaluations, evaluation),
            model=model.learnt_state(),
            method=method.state(),
            probes=probes | state.probes,
            diagnostics=(*state.diagnostics, learnt.diagnostics | _drifts(state.probes, probes)),
        )
        yield TaskResult(
            task=index,
            classes=stream.tasks[index].classes,
            metrics=state.metrics(index + 1),
            accuracies=accuracy_row(evaluation),
            losses=[fmean(losses) for losses in learnt.step_losses],
            step_losses=learnt.step_losses,
            factors=learnt.factors,
            seconds=time.perf_counter() - start,
            saved_s=with_others.saved_s,
            state=state,
            model=model,
        )


def _check_goes_on(config: RunConfig, state: RunState, fresh: RunState) -> None:
    """Raise StateError unless ``state`` is a whole one of the run that would begin with ``fresh``."""
    if state[:3] != fresh[:3]:
        raise StateError(
            f"the saved state belongs to run {state.config_hash} on {state.evaluate_on}, this is {fresh.config_hash} "
            f"on {fresh.evaluate_on} (backbones {state.backbone_hash} and {fresh.backbone_hash}); "
            "start in an empty folder"
        )
    check_state(config, state)
    said, is_now = ((facts.classes, facts.channels, facts.raw) for facts in (state.data, fresh.data) if facts)
    if said != is_now:
        raise StateError(f"the saved state is of another {config.data.dataset} than is here; start in an empty folder")


class _Setup(NamedTuple):
    """What a run has from its first task to its last; the model and the method change as they learn."""

    config: RunConfig
    model: ContinualModel
    method: Method
    stream: Stream
    input: Input
    given: Given


class _Learnt(NamedTuple):
    step_losses: list[list[float]]
    factors: dict[str, Tensor]
    diagnostics: dict[str, float]


def _learn(
    setup: _Setup, index: int, on_epoch: Callable[[EpochDone], None], shared: Shared, keys: Mapping[str, str]
) -> _Learnt:
    """The three moments of one task."""
    config, model, method, stream, input, given = setup
    task, optim = stream.tasks[index], config.optim.of_task(index)

    def passes(purpose: str) -> Iterator[Batch]:
        generator = seeded(config.seed, index, purpose)
        if given.orders is None:
            rows = task.train_rows[torch.randperm(len(task.train_rows), generator=generator)]
        else:
            rows = ordered_rows(given.orders, index, purpose, task.train_rows)
        return training_batches(stream.train, rows, input, optim.batch_size, generator)

    def plain() -> Iterator[Batch]:
        return evaluation_batches(stream.train, task.train_rows, input, optim.batch_size)

    def once(moment: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return shared.once(f"{keys[moment]}-covariance", compute)

    data = TaskData(task, len(stream.tasks), config.seed, passes, plain, once, given.draws)
    if given.heads is None:
        assert isinstance(optim.head_init, str)
        model.add_head(len(task.classes), optim.head_init, seeded(config.seed, index, "head"))
    else:
        head = model.add_head(len(task.classes), "zero", torch.Generator())
        head.load_state_dict(given_head(given.heads, index, len(task.classes), model.width))
    method.begin_task(model, data)
    trainable = method.trainable(model)

    def train() -> dict[str, Tensor]:
        step_losses = train_task(model, method, task, optim, passes, on_epoch)
        return {"step_losses": torch.tensor(step_losses, dtype=torch.float64), **trainable.named()}

    trained = shared.once(f"{keys['after']}-trained", train)
    trainable.load(trained)
    factors = method.end_task(model, data)
    diagnostics = {"params/trainable": float(trainable.size), "precision/bits": float(BITS[model.precision])}
    return _Learnt(trained["step_losses"].tolist(), factors, diagnostics | method.diagnostics())


def _drifts(before: dict[str, Tensor], now: dict[str, Tensor]) -> dict[str, float]:
    """``drift/task<j>`` of every old task, and ``drift/mean`` over them."""
    drifts = {f"drift/task{task}": drift(features, now[task]) for task, features in before.items()}
    return drifts | ({"drift/mean": fmean(drifts.values())} if drifts else {})


def check(config: RunConfig) -> None:
    """Raise ConfigError unless the settings fit each other, the dataset and the backbone; nothing heavy is loaded."""
    backbone = meta_backbone(config.backbone)
    shape = shape_of(backbone)
    rank = getattr(config.method, "rank", 1)
    if rank > shape.width:
        raise ConfigError(f"method.rank must be at most the backbone's width {shape.width}, got {rank}")
    model = ContinualModel(backbone, shape.width)
    make_method(config.method).prepare(model)
    if config.compile and model.prompts is not None:
        raise ConfigError(f"compile must be false with method {config.method.name}: prompts change the model's code")
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
    Given.of(config)
    require_device(config.device)


def require_device(name: str) -> None:
    """Raise ConfigError where CUDA is asked for and there is none; takes hold of no GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device must be auto or cpu here: no CUDA device is available, got cuda")


def pick_device(name: str) -> torch.device:
    """The device that ``config.device`` names, with its index; "auto" is CUDA where there is one.

    Raises:
        ConfigError: CUDA is asked for and there is none.
    """
    require_device(name)
    if name != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def identity(config: RunConfig) -> dict[str, str]:
    """What a run's numbers depend on besides its settings: recorded with every result."""
    stream = make_stream(config.data.model_copy(update={"train_on": "train"}), "validation")
    packages = ("torch", "timm", "inflora-sweeps")
    return {
        "config_hash": config_hash(config),
        "dataset": config.data.dataset,
        "dataset_hash": stream.manifest.content_hash,
        "class_order": ",".join(map(str, stream.class_order)),
        "split_hash": stream.split_hash,
        "backbone_hash": backbone_hash(build_backbone(config.backbone)),
        "seed": str(config.seed),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }
