"""What every method is: three moments of a task, and a state that can be saved."""

from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor, nn

from inflora.config import Settings
from inflora.data.loader import Batch
from inflora.data.stream import Stream, Task
from inflora.model import ContinualModel

S = TypeVar("S", bound=Settings)


class TaskData(NamedTuple):
    """What a method sees of a task: its description, the stream's length, and passes over its training images.

    ``passes(purpose)`` is one augmented pass; the same purpose gives the same pass, on any number of workers.
    """

    task: Task
    stream_tasks: int
    seed: int
    passes: Callable[[str], Iterator[Batch]]


class Method(Generic[S]):
    """A continual learning method: before a task, the loss of a batch, after a task.

    The defaults train the new task's classifier on frozen features. A subclass says what else it adapts.
    """

    def __init__(self, settings: S) -> None:
        self.settings = settings

    def arrange(self, stream: Stream) -> Stream:
        """The stream as this method is given it."""
        return stream

    def prepare(self, model: ContinualModel) -> None:
        """Make the freshly built model adaptable, once, before any task or restored state."""

    def begin_task(self, model: ContinualModel, data: TaskData) -> None:
        """Set up what the task will train; its classifier is already there."""

    def loss(self, model: ContinualModel, batch: Batch, task: Task) -> Tensor:
        """Mean loss of a batch: cross-entropy over the current task's classes only."""
        logits = model.heads[-1](model.features(batch.images))
        return nn.functional.cross_entropy(logits, batch.labels - task.first_label)

    def end_task(self, model: ContinualModel, data: TaskData) -> None:
        """Fold in what was trained and remember what the next tasks must respect."""

    def state(self) -> dict[str, Tensor]:
        """What the method must remember from task to task, besides the model."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state`` gave."""
        assert not state, f"{type(self).__name__} keeps no state, got {', '.join(state)}"
