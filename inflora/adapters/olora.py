"""O-LoRA: each task learns in a subspace pulled away from the old tasks' (Wang et al., EMNLP 2023)."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from inflora.adapters.lora import TrainedLoRA
from inflora.config import OLoRASettings
from inflora.layout import Layout, Spec
from inflora.lora import adapted_layers
from inflora.model import ContinualModel
from inflora.task_data import TaskData


class OLoRA(TrainedLoRA[OLoRASettings]):
    """The rows of every old A stand for its task's gradient subspace; the new A's rows are to be orthogonal to them."""

    def __init__(self, settings: OLoRASettings) -> None:
        super().__init__(settings)
        self.old_A: dict[str, Tensor] = {}

    def penalties(self, model: ContinualModel) -> Iterator[Tensor]:
        """For each layer, ``penalty`` times the sum of squares of ``A_old A_new^T`` over all old tasks."""
        for name, layer in adapted_layers(model):
            if name in self.old_A and layer.lora_A is not None:
                yield self.settings.penalty * (self.old_A[name] @ layer.lora_A.T).square().sum()

    def begin_task(self, model: ContinualModel, data: TaskData) -> None:
        super().begin_task(model, data)
        self.old_A = {name: rows.to(model.device) for name, rows in self.old_A.items()}

    def end_task(self, model: ContinualModel, data: TaskData) -> dict[str, Tensor]:
        learnt = super().end_task(model, data)
        for key, lora_A in learnt.items():
            name, _, factor = key.rpartition(".")
            if factor == "lora_A":
                old = self.old_A.get(name, lora_A[:0])
                self.old_A[name] = torch.cat([old.to(lora_A), lora_A])
        return learnt

    def state(self) -> dict[str, Tensor]:
        return {name: rows.cpu() for name, rows in self.old_A.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.old_A = dict(state)

    def state_layout(self, model: ContinualModel, sizes: Sequence[int], names: Collection[str]) -> Layout:
        rows = len(sizes) * self.settings.rank
        return {name: Spec((rows, layer.in_features)) for name, layer in adapted_layers(model)}
