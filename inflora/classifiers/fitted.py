"""Classifiers in closed form: statistics of all classes' features are kept, and solved anew after every task.

Shapes: B batch, C classes of all tasks so far, D width.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from inflora.classifiers.base import Classifier
from inflora.classifiers.drift import drift_map
from inflora.classifiers.linear import new_head
from inflora.classifiers.statistics import class_means
from inflora.config import FittedSettings
from inflora.data.stream import Task
from inflora.features import Features
from inflora.layout import Layout, Spec
from inflora.state import StateError
from inflora.task_data import TaskData

S = TypeVar("S", bound=FittedSettings)


class Fitted(Classifier[S]):
    """Remembers tensors that a subclass registers as buffers, and finds its answers from them.

    While an adapter is trained a linear head says where the adapter should go; it is thrown away when the task ends.
    ``counts`` (C) are the numbers of looks at the classes' training images.
    """

    trained_alone = False
    is_fitted = True
    counts: Tensor

    def __init__(self, settings: S, width: int) -> None:
        super().__init__(settings, width)
        self.head: nn.Linear | None = None
        self.register_buffer("counts", torch.zeros(0))

    @property
    def follows_drift(self) -> bool:
        return self.settings.drift is not None

    @property
    def views(self) -> int:
        return self.settings.views

    @property
    def classes(self) -> int:
        return len(self.counts)

    def begin_task(self, data: TaskData) -> None:
        self.head = new_head(self.width, data)

    def task_parameters(self) -> list[nn.Parameter]:
        return [] if self.head is None else list(self.head.parameters())

    def loss(self, features_BD: Tensor, labels_B: Tensor, task: Task) -> Tensor:
        """Cross-entropy over the current task's classes only, of the head that the task will throw away."""
        assert self.head is not None
        return nn.functional.cross_entropy(self.head(features_BD), labels_B - task.first_label)

    @torch.no_grad()
    def fit(self, seen: Features, before: Features | None, data: TaskData) -> None:
        """Let what is remembered follow the features, add the new classes, and solve.

        Raises:
            FloatingPointError: The features are too large.
        """
        if before is not None and self.settings.drift is not None:
            self.follow(before.features_ND, seen.features_ND, self.settings.drift)
        count_C, mean_CD = class_means(seen)
        self.counts = torch.cat([self.counts.to(count_C.device), count_C.float()])
        self.remember(seen, count_C, mean_CD, data)
        self.head = None
        # What is remembered is in float32, which squares of large features leave; solvers stop at it with other errors.
        if not all(tensor.isfinite().all() for tensor in self.buffers()):
            raise FloatingPointError(
                f"the features after task {data.task.index} are too large to be remembered; try a smaller optim.lr"
            )
        self.solve()

    @abstractmethod
    def follow(self, before_ND: Tensor, after_ND: Tensor, ridge: float) -> None:
        """Carry what is remembered along: the new task's images have moved from ``before_ND`` to ``after_ND``."""

    @abstractmethod
    def remember(self, seen: Features, count_C: Tensor, mean_CD: Tensor, data: TaskData) -> None:
        """Add the new task's classes, whose numbers and means are given."""

    @abstractmethod
    def solve(self) -> None:
        """Find what ``forward`` needs from what is remembered."""

    def log_priors(self) -> Tensor:
        """The logarithms (C, float64) of the classes' shares of the images; the lowest number for one without any."""
        counts_C = self.counts.double()
        return (counts_C / counts_C.sum()).log().clamp_min(torch.finfo(torch.float32).min)

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.cpu().clone() for name, tensor in self.state_dict().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, tensor in state.items():
            self.register_buffer(name, tensor.clone())
        try:
            self.solve()
        except (torch.linalg.LinAlgError, OverflowError):
            raise StateError("the state is damaged: the classifier's statistics are of no images") from None

    def layout(self, sizes: Sequence[int]) -> Layout:
        return {"counts": Spec((sum(sizes),))}


class Means(Fitted[S]):
    """Also keeps every class's mean feature, ``means`` (C x D), zero for a class without images."""

    means: Tensor

    def __init__(self, settings: S, width: int) -> None:
        super().__init__(settings, width)
        self.register_buffer("means", torch.zeros(0, width))

    def follow(self, before_ND: Tensor, after_ND: Tensor, ridge: float) -> None:
        self.carry(drift_map(before_ND, after_ND, ridge))

    def carry(self, map_DD: Tensor) -> None:
        """Take old features ``f`` (rows) to ``f W``."""
        self.means = (self.means.double() @ map_DD).float()

    def remember(self, seen: Features, count_C: Tensor, mean_CD: Tensor, data: TaskData) -> None:
        self.means = torch.cat([self.means.to(mean_CD.device), mean_CD.float()])

    def layout(self, sizes: Sequence[int]) -> Layout:
        return {**super().layout(sizes), "means": Spec((sum(sizes), self.width))}


class LinearlyFitted(Means[S]):
    """Its answer is one linear layer: ``weight`` (C x D) and ``bias`` (C)."""

    weight: Tensor
    bias: Tensor

    def __init__(self, settings: S, width: int) -> None:
        super().__init__(settings, width)
        self.register_buffer("weight", torch.zeros(0, width), persistent=False)
        self.register_buffer("bias", torch.zeros(0), persistent=False)

    def forward(self, features_BD: Tensor) -> Tensor:
        return nn.functional.linear(features_BD, self.weight, self.bias)

    def as_linear(self) -> nn.Linear | None:
        linear = nn.Linear(self.width, self.classes, device="meta")
        linear.weight, linear.bias = nn.Parameter(self.weight), nn.Parameter(self.bias)
        return linear
