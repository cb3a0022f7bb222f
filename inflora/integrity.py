"""The facts that a state keeps of its data, and the check that it holds all that its config says."""

from collections.abc import Collection, Iterator, Sequence

import torch

from inflora.backbone import meta_backbone, shape_of
from inflora.config import RunConfig, config_hash
from inflora.data.stream import Stream
from inflora.data.tasks import task_sizes
from inflora.drift import PROBES
from inflora.layout import Layout, Spec, misfit
from inflora.learner import make_learner
from inflora.state import DataFacts, RunState, StateError

_SHOWN = 64  # enough to know how bright a dataset's images are; decoded in a blink


def _brightness(stream: Stream) -> tuple[float, float]:
    """The least and the greatest mean pixel among some training images, spread evenly over all tasks."""
    rows = torch.cat([task.train_rows for task in stream.tasks])
    chosen = rows[torch.linspace(0, len(rows) - 1, min(_SHOWN, len(rows))).long()]
    means = [round(float(stream.train.pixels.array(row).mean()) / 255, 4) for row in chosen.tolist()]
    return min(means), max(means)


def facts_of(stream: Stream) -> DataFacts:
    """Describe a run's data for its state."""
    names = [name for task in stream.tasks for name in task.classes]
    class_of = stream.class_of.tolist()
    return DataFacts(
        classes=tuple(names[class_of.index(label)] for label in range(max(class_of) + 1)),
        class_of=tuple(class_of),
        channels=stream.manifest.channels,
        raw=stream.manifest.form == "raw",
        brightness=_brightness(stream),
        content_hash=stream.manifest.content_hash,
        split_hash=stream.split_hash,
    )


def check_state(config: RunConfig, state: RunState) -> None:
    """Raise StateError unless ``state`` is one of this config's: its data's facts, and every tensor, finite.

    Neither the dataset nor the backbone's weights are opened.
    """
    if state.config_hash != config_hash(config):
        raise StateError(
            f"the state is of the settings {state.config_hash}, config.yaml has {config_hash(config)}: edited, "
            "a file that it names has changed, or of another version"
        )
    if state.data is None:
        raise StateError("the state is of an older version, without the names of its classes; train it again")
    if problem := next(_problems(config, state, state.data), ""):
        raise StateError(f"the state is damaged: {problem}")


def _problems(config: RunConfig, state: RunState, data: DataFacts) -> Iterator[str]:
    """Find what is wrong with a state; each check relies on those before it."""
    classes, outputs, sizes = len(data.classes), len(data.class_of), task_sizes(config.data, len(data.classes))
    if data.class_of != tuple(label % max(classes, 1) for label in range(outputs)) or outputs % max(classes, 1):
        yield f"class_of does not give each output one of the {classes} classes"
    if sum(sizes) != outputs or not all(sizes):
        yield f"{outputs} outputs of {classes} classes are not what {len(sizes)} tasks bring"
    if state.tasks != len(sizes):
        yield f"tasks must be {len(sizes)}, got {state.tasks}"
    channels = shape_of(meta_backbone(config.backbone)).channels
    if data.channels not in (1, channels):
        yield f"channels must be 1 or the backbone's {channels}, got {data.channels}"
    layouts = layouts_of(config, sizes[: state.tasks_done], state.adapter.keys())
    for group, tensors in state.tensors.items():
        if problem := misfit(tensors, layouts[group]):
            yield f"{group}/{problem}"


def layouts_of(config: RunConfig, sizes: Sequence[int], names: Collection[str]) -> dict[str, Layout]:
    """The tensors of a state after tasks of so many classes each; ``names`` are those of its adapter's tensors."""
    model, adapter = make_learner(config, meta_backbone(config.backbone))
    return {
        "model": adapter.model_layout(model, sizes),
        "adapter": adapter.state_layout(model, sizes, names),
        "classifier": model.classifier.layout(sizes),
        "probes": {str(task): Spec((range(1, PROBES + 1), model.width)) for task in range(len(sizes))},
    }
