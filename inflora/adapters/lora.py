"""LoRA: plain low-rank adaptation, task after task, with nothing protected (Hu et al., ICLR 2022)."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from inflora.adapters.base import Adapter
from inflora.config import FixedRankSettings, LoRASettings
from inflora.injection import inject
from inflora.lora import adapted_layers, adapter_parameters, merge_all
from inflora.model import ContinualModel
from inflora.task_data import TaskData

S = TypeVar("S", bound=FixedRankSettings)


class TrainedLoRA(Adapter[S]):
    """Both matrices of each adapter are trained, A from LoRA's usual initialisation, and merged after the task."""

    is_trained = True

    def prepare(self, model: ContinualModel) -> None:
        inject(model.backbone, self.settings.blocks, self.settings.targets)

    def begin_task(self, model: ContinualModel, data: TaskData) -> None:
        for name, layer in adapted_layers(model):
            bound = layer.in_features**-0.5
            shape = (self.settings.rank, layer.in_features)
            generator = data.draws.generator(data.task.index, "lora_A", name)
            layer.attach(torch.empty(shape).uniform_(-bound, bound, generator=generator), train_A=True)

    def task_parameters(self, model: ContinualModel) -> list[nn.Parameter]:
        return adapter_parameters(model)

    def end_task(self, model: ContinualModel, data: TaskData) -> dict[str, Tensor]:
        return merge_all(model, self.settings.share_merged(data.task.index))


class LoRA(TrainedLoRA[LoRASettings]):
    """Nothing but plain LoRA, one task after another."""
