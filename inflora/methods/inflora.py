"""InfLoRA: interference-free low-rank adaptation (Liang and Li, CVPR 2024, arXiv 2404.00228)."""

import warnings

import torch
from torch import Tensor

from inflora import distributed
from inflora.backbone import gather_covariance
from inflora.config import InfLoRASettings
from inflora.lora import adapted_layers, inject, merge_all
from inflora.methods.base import Method, TaskData
from inflora.model import ContinualModel
from inflora.subspace import Memory, design, threshold, update


class InfLoRA(Method[InfLoRASettings]):
    """Each task learns in a subspace that old tasks' inputs do not reach, and then merges into the weights."""

    def __init__(self, settings: InfLoRASettings) -> None:
        super().__init__(settings)
        self.memory: dict[str, Memory] = {}

    def prepare(self, model: ContinualModel) -> None:
        inject(model.backbone, self.settings.blocks)

    def begin_task(self, model: ContinualModel, data: TaskData) -> None:
        covariances = input_covariances(model, data, "before")
        for name, layer in adapted_layers(model):
            lora_A = design(covariances[name], self.memory.get(name), self.settings.rank)
            if len(lora_A) < self.settings.rank:
                warnings.warn(
                    f"task {data.task.index}: {name} has {len(lora_A)} free directions left, "
                    f"fewer than method.rank={self.settings.rank}; using {len(lora_A)}",
                    stacklevel=2,
                )
            layer.attach(lora_A)

    def end_task(self, model: ContinualModel, data: TaskData) -> None:
        merge_all(model)
        settings, task = self.settings, data.task
        total_tasks = settings.total_tasks or data.stream_tasks
        if task.index + 1 == data.stream_tasks:
            return  # no task comes after the last one
        share = threshold(task.index, total_tasks, settings.energy, settings.energy_end)
        for name, covariance in input_covariances(model, data, "after").items():
            self.memory[name] = update(
                self.memory.get(name),
                covariance,
                share,
                energy_of=settings.energy_of,
                may_flip=settings.memory == "dualgpm",
            )

    def state(self) -> dict[str, Tensor]:
        return {f"{name}.{memory.kind}": memory.basis_DK.cpu() for name, memory in self.memory.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for key, basis_DK in state.items():
            name, _, kind = key.rpartition(".")
            assert kind in ("remove", "retain"), key
            self.memory[name] = Memory("remove" if kind == "remove" else "retain", basis_DK)


def input_covariances(model: ContinualModel, data: TaskData, moment: str) -> dict[str, Tensor]:
    """Uncentred covariance (D x D) of what each adapted layer reads, in one augmented pass over the task's images.

    Summed over all workers before anything is decomposed, so that all of them design the same adapters.
    """
    with torch.no_grad(), gather_covariance(model) as seen:
        for batch in data.passes(f"covariance-{moment}"):
            model.features(batch.images)
    covariances = {}
    for name, covariance in seen.items():
        distributed.all_sum(covariance.sum_DD)
        distributed.all_sum(covariance.count)
        covariances[name] = covariance.sum_DD / covariance.count
    return covariances
