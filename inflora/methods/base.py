"""What every method is: three moments of a task, and a state that can be saved."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from inflora.config import Settings
from inflora.data.loader import Batch
from inflora.data.stream import Stream, Task
from inflora.layout import Layout
from inflora.lora import adapter_parameters
from inflora.model import ContinualModel

S = TypeVar("S", bound=Settings)


def _here(_: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    return compute()


class TaskData(NamedTuple):
    """What a method sees of a task: its description, the stream's length, and passes over its training images.

    ``passes(purpose)`` is one augmented pass; the same purpose gives the same pass, on any number of workers.
    ``plain()`` is one pass without augmentation. ``once(moment, compute)`` is what ``compute`` gives, perhaps computed
    by another run that agrees on all it depends on: the images, and the model "before" or "after" its training.
    ``draws`` are features given for classifier alignment (``inflora.data.order``), None where they are drawn.
    """

    task: Task
    stream_tasks: int
    seed: int
    passes: Callable[[str], Iterator[Batch]]
    plain: Callable[[], Iterator[Batch]]
    once: Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]] = _here
    draws: dict[str, Tensor] | None = None


class Trainable(NamedTuple):
    """What the current task trains: its classifier, and whatever the method adapts with it."""

    classifier: list[nn.Parameter]
    adapted: list[nn.Parameter]

    @property
    def size(self) -> int:
        """How many numbers that is: ``params/trainable``."""
        return sum(parameter.numel() for parameter in (*self.classifier, *self.adapted))

    def named(self) -> dict[str, Tensor]:
        """The parameters, in order."""
        return {str(index): parameter.detach() for index, parameter in enumerate((*self.classifier, *self.adapted))}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take the values that ``named`` gave after the same training."""
        for name, parameter in self.named().items():
            parameter.copy_(values[name])


class Method(Generic[S]):
    """A continual learning method: before a task, the loss of a batch, after a task.

    The defaults train the new task's classifier, and adapters where there are any. ``passes`` are the augmented passes
    that it makes over a task's images besides the epochs of its training; ``joins_tasks``: it learns all tasks as one.
    """

    passes: ClassVar[tuple[str, ...]] = ()
    joins_tasks: ClassVar[bool] = False

    def __init__(self, settings: S) -> None:
        self.settings = settings

    def arrange(self, stream: Stream) -> Stream:
        """The stream as this method is given it."""
        return stream.merged() if self.joins_tasks else stream

    def prepare(self, model: ContinualModel) -> None:
        """Make the freshly built model adaptable, once, before any task or restored state.

        Raises:
            ConfigError: The settings do not fit the backbone.
        """

    def begin_task(self, model: ContinualModel, data: TaskData) -> None:
        """Set up what the task will train; its classifier is already there."""

    def trainable(self, model: ContinualModel) -> Trainable:
        """What the task that has begun trains; nothing else may change until its end."""
        return Trainable(list(model.heads[-1].parameters()), adapter_parameters(model))

    def loss(self, model: ContinualModel, batch: Batch, task: Task) -> Tensor:
        """Mean loss of a batch: cross-entropy over the current task's classes only."""
        return task_loss(model, model.features(batch.images), batch, task)

    def end_task(self, model: ContinualModel, data: TaskData) -> dict[str, Tensor]:
        """Fold in what was trained and remember what the next tasks must respect.

        What is folded in and would be lost comes back by name: ``<layer>.lora_A`` and ``<layer>.lora_B``.
        """
        return {}

    def diagnostics(self) -> dict[str, float]:
        """What there is to know of the method's inside after a task, by metric name."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What the method must remember from task to task, besides the model.

        What is named after a task (``.../<task>``) stays as it is from then on, and is written to disk once.
        """
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state`` gave."""
        assert not state, f"{type(self).__name__} keeps no state, got {', '.join(state)}"

    def model_layout(self, model: ContinualModel, sizes: Sequence[int]) -> Layout:
        """What the prepared model's ``learnt_state`` is after tasks of so many classes each."""
        return model.learnt_layout(sizes)

    def state_layout(self, model: ContinualModel, sizes: Sequence[int], names: Collection[str]) -> Layout:
        """What ``state`` is then; ``names`` are those of the state in question, where several would do."""
        return {}


def task_loss(model: ContinualModel, features: Tensor, batch: Batch, task: Task) -> Tensor:
    """Cross-entropy over the current task's classes, given a batch's features."""
    return nn.functional.cross_entropy(model.heads[-1](features), batch.labels - task.first_label)
