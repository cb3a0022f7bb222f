"""What a state says of its data, and whether it holds what its config says: else it is refused, not answered from."""

from collections.abc import Collection, Iterator, Sequence

import torch

from inflora.backbone import meta_backbone, shape_of
from inflora.config import RunConfig, config_hash
from inflora.data.stream import Stream
from inflora.drift import PROBES
from inflora.layout import Layout, Spec, misfit
from inflora.methods import make_method
from inflora.model import ContinualModel
from inflora.state import DataFacts, RunState, StateError

_SHOWN = 64  # enough to know how bright a dataset's images are; decoded in a blink


def _brightness(stream: Stream) -> tuple[float, float]:
    """The least and the greatest mean pixel among some training images, spread evenly over all tasks."""
    rows = torch.cat([task.train_rows for task in stream.tasks])
    chosen = rows[torch.linspace(0, len(rows) - 1, min(_SHOWN, len(rows))).long()]
    means = [round(float(stream.train.pixels.array(row).mean()) / 255, 4) for row in chosen.tolist()]
    return min(means), max(means)


def facts_of(stream: Stream) -> DataFacts:
    """What a run's state says of its data."""
    names = [name for task in stream.tasks for name in task.classes]
    class_of = stream.class_of.tolist()
    return DataFacts(
        classes=tuple(names[class_of.index(label)] for label in range(max(class_of) + 1)),
        class_of=tuple(class_of),
        channels=stream.manifest.channels,
        raw=stream.manifest.form == "raw",
        brightness=_brightness(stream),
    )


def check_state(config: RunConfig, state: RunState) -> None:
    """Raise StateError unless ``state`` is one of this config's: its data's facts, and every tensor, finite.

    Neither the dataset nor the backbone's weights are opened.
    """
    if state.config_hash != config_hash(config):
        raise StateError(
            f"the state is of the settings {state.config_hash}, config.yaml has {config_hash(config)}: edited, "
            "or of another version"
        )
    if state.data is None:
        raise StateError("the state is of an older version, without the names of its classes; train it again")
    if problem := next(_problems(config, state, state.data), ""):
        raise StateError(f"the state is damaged: {problem}")


def _problems(config: RunConfig, state: RunState, data: DataFacts) -> Iterator[str]:
    """What is wrong; each check relies on those before it."""
    classes, outputs, sizes = len(data.classes), len(data.class_of), _task_sizes(config, data)
    if data.class_of != tuple(label % max(classes, 1) for label in range(outputs)) or outputs % max(classes, 1):
        yield f"class_of does not give each output one of the {classes} classes"
    if sum(sizes) != outputs or not all(sizes):
        yield f"{outputs} outputs of {classes} classes are not what {len(sizes)} tasks bring"
    if state.tasks != len(sizes):
        yield f"tasks must be {len(sizes)}, got {state.tasks}"
    channels = shape_of(meta_backbone(config.backbone)).channels
    if data.channels not in (1, channels):
        yield f"channels must be 1 or the backbone's {channels}, got {data.channels}"
    layouts = layouts_of(config, sizes[: state.tasks_done], state.method.keys())
    for group, tensors in (("model", state.model), ("method", state.method), ("probes", state.probes)):
        if problem := misfit(tensors, layouts[group]):
            yield f"{group}/{problem}"


def _task_sizes(config: RunConfig, data: DataFacts) -> tuple[int, ...]:
    """How many outputs each of the run's tasks brings."""
    classes, tasks = len(data.classes), config.data.tasks
    if make_method(config.method).joins_tasks:
        return (classes,)
    if config.data.scenario == "domain":
        return (classes,) * config.data.task_count
    return tasks if isinstance(tasks, tuple) else (classes // tasks,) * tasks


def layouts_of(config: RunConfig, sizes: Sequence[int], names: Collection[str]) -> dict[str, Layout]:
    """The tensors of a state after tasks of so many classes each; ``names`` are those of what its method remembers."""
    method, backbone = make_method(config.method), meta_backbone(config.backbone)
    width = shape_of(backbone).width
    model = ContinualModel(backbone, width)
    method.prepare(model)
    return {
        "model": method.model_layout(model, sizes),
        "method": method.state_layout(model, sizes, names),
        "probes": {str(task): Spec((range(1, PROBES + 1), width)) for task in range(len(sizes))},
    }
