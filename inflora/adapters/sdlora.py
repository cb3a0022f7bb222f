"""SD-LoRA: directions of old updates are kept, their magnitudes go on learning (Wu et al., ICLR 2025)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from inflora.adapters.lora import TrainedLoRA
from inflora.config import SDLoRASettings
from inflora.injection import inject
from inflora.layout import Layout, Spec
from inflora.lora import LoRALinear
from inflora.model import ContinualModel
from inflora.task_data import TaskData


class DecoupledLinear(LoRALinear):
    """``W + sum_k m_k B_k A_k + B A``: a sum over the old tasks k, and the current task's adapter.

    ``old_A`` (T x R x D) and ``old_B`` (T x O x R) are the old tasks' factors; ``magnitudes`` (T) are trained. The
    paper's directions have norm one. Here a magnitude is told in units of the norm that its task's update ended with,
    and starts at 1: a task that begins changes nothing, and one learning rate suits the updates of all layers.
    """

    old_A: Tensor
    old_B: Tensor
    magnitudes: nn.Parameter

    def __init__(self, plain: nn.Linear, rows: Sequence[slice] = (slice(None),)) -> None:
        super().__init__(plain, rows)
        self.register_buffer("old_A", self.weight.new_zeros(0, 0, self.in_features))
        self.register_buffer("old_B", self.weight.new_zeros(0, sum(self.sizes), 0))
        self.magnitudes = nn.Parameter(self.weight.new_zeros(0), requires_grad=False)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """The factors of all old directions and of the current adapter, side by side."""
        current = super().factors()
        if not len(self.magnitudes):
            return current
        scaled_B = (self.magnitudes[:, None, None] * self.old_B).permute(1, 0, 2).flatten(1)
        old = self.old_A.flatten(0, 1), scaled_B
        return old if current is None else (torch.cat([old[0], current[0]]), torch.cat([old[1], current[1]], dim=1))

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight plus all directions, each with its magnitude."""
        weight = self.weight.detach().clone()
        for magnitude, lora_A, lora_B in zip(self.magnitudes, self.old_A, self.old_B, strict=True):
            self.add_update(weight, lora_A, magnitude * lora_B)
        return weight

    @torch.no_grad()
    def keep(self, share: float) -> None:
        """Turn this share of the adapter into one more direction with its magnitude."""
        factors = self.detach_adapter(share)
        if factors is not None:
            lora_A, lora_B = factors
            self.old_A = torch.cat([self.old_A.reshape(-1, *lora_A.shape), lora_A[None]])
            self.old_B = torch.cat([self.old_B.reshape(-1, *lora_B.shape), lora_B[None]])
            magnitudes = torch.cat([self.magnitudes.detach(), self.magnitudes.new_ones(1)])
            self.magnitudes = nn.Parameter(magnitudes, requires_grad=False)


def decoupled_layers(model: nn.Module) -> Iterator[tuple[str, DecoupledLinear]]:
    """The adaptable layers of a prepared model, with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, DecoupledLinear))


class SDLoRA(TrainedLoRA[SDLoRASettings]):
    """The model grows by one direction for each layer and task, and so does the cost of a step: it is the method's."""

    def prepare(self, model: ContinualModel) -> None:
        inject(model.backbone, self.settings.blocks, self.settings.targets, DecoupledLinear)

    def begin_task(self, model: ContinualModel, data: TaskData) -> None:
        super().begin_task(model, data)
        for _, layer in decoupled_layers(model):
            layer.magnitudes.requires_grad_(True)

    def task_parameters(self, model: ContinualModel) -> list[nn.Parameter]:
        magnitudes = [layer.magnitudes for _, layer in decoupled_layers(model) if len(layer.magnitudes)]
        return super().task_parameters(model) + magnitudes

    def own_rates(self, model: ContinualModel) -> dict[nn.Parameter, float]:
        rate = self.settings.magnitude_lr
        return {} if rate is None else {layer.magnitudes: rate for _, layer in decoupled_layers(model)}

    def end_task(self, model: ContinualModel, data: TaskData) -> dict[str, Tensor]:
        for _, layer in decoupled_layers(model):
            layer.keep(self.settings.share_merged(data.task.index))
        return {}  # nothing is merged: the layers keep the factors, and go on changing how much each counts

    def model_layout(self, model: ContinualModel, sizes: Sequence[int]) -> Layout:
        tasks, rank, layout = len(sizes), self.settings.rank, dict(super().model_layout(model, sizes))
        for name, layer in decoupled_layers(model):
            layout[f"{name}.old_A"] = Spec((tasks, rank, layer.in_features))
            layout[f"{name}.old_B"] = Spec((tasks, sum(layer.sizes), rank))
            layout[f"{name}.magnitudes"] = Spec((tasks,))
        return layout
