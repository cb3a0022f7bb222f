"""Every classifier: it begins a task, is trained with the adapter or not, is fitted when the task is done, and tells.

Shapes: B batch, C classes of a task, D width of the features.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

from torch import Tensor, nn

from inflora.config import Settings
from inflora.data.stream import Task
from inflora.features import Features
from inflora.layout import Layout
from inflora.task_data import TaskData

S = TypeVar("S", bound=Settings)


class Classifier(nn.Module, ABC, Generic[S]):
    """Tells the classes of all tasks so far apart by their features; forward gives logits in order of learning.

    ``trained_alone``: its own training is worth the epochs where no adapter is trained with it; ``is_fitted``: it is
    fitted when a task has been learnt; ``follows_drift``: and then asks for the features before the task as well.
    """

    trained_alone: ClassVar[bool] = True
    is_fitted: ClassVar[bool] = False

    def __init__(self, settings: S, width: int) -> None:
        super().__init__()
        self.settings, self.width = settings, width

    @property
    @abstractmethod
    def classes(self) -> int:
        """The number of classes that it tells apart."""

    @abstractmethod
    def begin_task(self, data: TaskData) -> None:
        """Make room for the task's classes."""

    def task_parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained with the adapter, while a task is learnt."""
        return []

    @abstractmethod
    def loss(self, features_BD: Tensor, labels_B: Tensor, task: Task) -> Tensor:
        """Mean loss of a batch of the task that is being learnt."""

    @property
    def follows_drift(self) -> bool:
        return False

    @property
    def views(self) -> int:
        """The number of augmented looks at each image that it is fitted to, besides the plain one."""
        return 0

    def fit(self, seen: Features, before: Features | None, data: TaskData) -> None:
        """Learn from the finished task's features; the adapter has ended its task.

        ``before`` are those of the same images before the task, None where nothing has moved them.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """All that it remembers, on the CPU.

        Tensors named after a task (``.../<task>``) stay as they are from then on, and are written to disk once.
        """

    @abstractmethod
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state`` gave."""

    @abstractmethod
    def layout(self, sizes: Sequence[int]) -> Layout:
        """The names and shapes of ``state`` after tasks of so many classes each."""

    def as_linear(self) -> nn.Linear | None:
        """One linear layer that gives the same logits, for a plain timm model; None where there is none."""
        return None
