"""One linear layer per task, trained with the adapter on the classes of its task alone."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from inflora.classifiers.base import Classifier
from inflora.config import LinearSettings, Settings
from inflora.data.stream import Task
from inflora.layout import Layout, Spec
from inflora.task_data import TaskData

S = TypeVar("S", bound=Settings)


class LinearHeads(Classifier[S]):
    """A head per task, each with its own bias; what tells tasks apart is only how large their logits are."""

    def __init__(self, settings: S, width: int) -> None:
        super().__init__(settings, width)
        self.heads = nn.ModuleList()

    @property
    def classes(self) -> int:
        return sum(len(head.get_parameter("bias")) for head in self.heads)

    def begin_task(self, data: TaskData) -> None:
        self.heads.append(new_head(self.width, data))

    def task_parameters(self) -> list[nn.Parameter]:
        return list(self.heads[-1].parameters())

    def loss(self, features_BD: Tensor, labels_B: Tensor, task: Task) -> Tensor:
        """Cross-entropy over the current task's classes only: old heads are neither seen nor moved."""
        return nn.functional.cross_entropy(self.heads[-1](features_BD), labels_B - task.first_label)

    def forward(self, features_BD: Tensor) -> Tensor:
        return torch.cat([head(features_BD) for head in self.heads], dim=1)

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self.state_dict().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for task in range(sum(name.endswith(".weight") for name in state)):
            self.heads.append(_empty_head(self.width, len(state[f"heads.{task}.bias"])))
        self.load_state_dict({name: state[name] for name in self.state_dict()})

    def layout(self, sizes: Sequence[int]) -> Layout:
        weights = {f"heads.{task}.weight": Spec((classes, self.width)) for task, classes in enumerate(sizes)}
        return weights | {f"heads.{task}.bias": Spec((classes,)) for task, classes in enumerate(sizes)}

    def as_linear(self) -> nn.Linear | None:
        linear = nn.Linear(self.width, self.classes, device="meta")
        linear.weight, linear.bias = map(nn.Parameter, self.joined())
        return linear

    def joined(self) -> tuple[Tensor, Tensor]:
        """The weights (all classes x D) and biases of all heads, in order of learning."""
        weight_CD, bias_C = (
            torch.cat([head.get_parameter(name) for head in self.heads]) for name in ("weight", "bias")
        )
        return weight_CD, bias_C


class Linear(LinearHeads[LinearSettings]):
    """The heads as the tasks have left them."""


def new_head(width: int, data: TaskData) -> nn.Linear:
    """A linear layer for the task's classes, as the run's draws begin it."""
    head = _empty_head(width, len(data.task.classes))
    data.draws.begin_head(head, data.task.index, data.optim.head_init)
    return head.to(data.input_format.device)


def _empty_head(width: int, classes: int) -> nn.Linear:
    # Uninitialised: nn.Linear would draw from the process's own generator.
    return nn.utils.skip_init(nn.Linear, width, classes)
