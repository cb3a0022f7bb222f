"""Every adapter: it prepares the model once, begins a task, may add to the loss, ends the task, and has a state."""

from collections.abc import Collection, Iterable, Sequence
from typing import ClassVar, Generic, TypeVar

from torch import Tensor, nn

from inflora.config import Settings
from inflora.layout import Layout
from inflora.model import ContinualModel
from inflora.task_data import TaskData

S = TypeVar("S", bound=Settings)


class Adapter(Generic[S]):
    """Adapts nothing: the frozen backbone. A subclass says what changes while a task is learnt, and what stays.

    ``passes`` are the augmented passes that it makes over a task's images besides the epochs of training;
    ``is_trained``: there are parameters of it to train.
    """

    passes: tuple[str, ...] = ()
    is_trained: ClassVar[bool] = False

    def __init__(self, settings: S) -> None:
        self.settings = settings

    def prepare(self, model: ContinualModel) -> None:
        """Make the freshly built model adaptable, once, before any task or restored state.

        Raises:
            ConfigError: The settings do not fit the backbone.
        """

    def begin_task(self, model: ContinualModel, data: TaskData) -> None:
        """Set up what the task will train."""

    def task_parameters(self, model: ContinualModel) -> list[nn.Parameter]:
        """The parameters that the task that has begun trains; nothing else of the backbone changes until its end."""
        return []

    def adapts(self, task: int) -> bool:
        """True where learning ``task`` changes the features."""
        return self.is_trained

    def own_rates(self, model: ContinualModel) -> dict[nn.Parameter, float]:
        """The full learning rates of those ``task_parameters`` that have one of their own, in place of ``optim.lr``."""
        return {}

    def penalties(self, model: ContinualModel) -> Iterable[Tensor]:
        """Terms that are added to each batch's loss."""
        return ()

    def end_task(self, model: ContinualModel, data: TaskData) -> dict[str, Tensor]:
        """Fold in what was trained and remember what the next tasks must respect.

        Factors that are folded in and would be lost come back by name: ``<layer>.lora_A`` and ``<layer>.lora_B``.
        """
        return {}

    def diagnostics(self) -> dict[str, float]:
        """Numbers of the adapter's inside after a task, by metric name."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """All that it remembers from task to task, besides the model.

        Tensors named after a task (``.../<task>``) stay as they are from then on, and are written to disk once.
        """
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state`` gave."""
        assert not state, f"{type(self).__name__} keeps no state, got {', '.join(state)}"

    def model_layout(self, model: ContinualModel, sizes: Sequence[int]) -> Layout:
        """The names and shapes of the prepared model's ``learnt_state`` after tasks of so many classes each."""
        return model.learnt_layout(len(sizes))

    def state_layout(self, model: ContinualModel, sizes: Sequence[int], names: Collection[str]) -> Layout:
        """The names and shapes of ``state`` then; ``names`` are the state's in question, where several would do."""
        return {}
