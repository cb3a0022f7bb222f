"""InfLoRA: interference-free low-rank adaptation (Liang and Li, CVPR 2024, arXiv 2404.00228)."""

import warnings
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from inflora.adapters.base import Adapter
from inflora.adapters.covariances import input_covariances
from inflora.adapters.memories import from_first_worker, memory_of
from inflora.config import InfLoRASettings
from inflora.distributed import broadcast
from inflora.injection import inject
from inflora.layout import Layout, Spec
from inflora.lora import adapted_layers, adapter_parameters, merge_all, short_name
from inflora.model import ContinualModel
from inflora.subspace import Memory, balanced, design, energy_inside, free_projector, taken_count, threshold, update
from inflora.task_data import TaskData


class InfLoRA(Adapter[InfLoRASettings]):
    """Each task learns in a subspace that old tasks' inputs do not reach, and then merges into the weights.

    A task adds ``B_t A_t`` to a layer's weight (the paper writes the factors the other way round). ``A_t`` is designed
    before the task, so that ``B_t A_t h = 0`` for the inputs ``h`` of old tasks; with it fixed, as
    published, only ``B_t`` is trained. With ``train_A`` its rows are trained too, and stay among the free directions.

    Free directions are a hard choice: what is left free is changed as if no old task had used it at all. With
    ``balance`` what is merged weighs old inputs against new ones in every direction (``subspace.balanced``): also in
    those that are taken, where it may undo what the update does to old inputs elsewhere. For that it remembers the sum
    of ``h h^T`` (D x D) over the inputs of old tasks, an image of any task counting alike.
    """

    passes = ("covariance-before", "covariance-after")
    is_trained = True

    def __init__(self, settings: InfLoRASettings) -> None:
        super().__init__(settings)
        self.memory: dict[str, Memory] = {}
        self.inputs: dict[str, Tensor] = {}
        self._diagnostics: dict[str, float] = {}

    def prepare(self, model: ContinualModel) -> None:
        inject(model.backbone, self.settings.blocks, self.settings.targets)

    def begin_task(self, model: ContinualModel, data: TaskData) -> None:
        """Design ``A_t`` (equations 8 and 9): the new inputs' leading directions that old tasks leave free."""
        covariances, energy_of = input_covariances(model, data, "before"), self.settings.energy_of
        self._diagnostics = {}
        layers = dict(adapted_layers(model))
        memories = [self.memory.get(name) for name in layers]
        # All layers at once: those of one width are decomposed together.
        rank = self._share(data) if self.settings.rank == "auto" else self.settings.rank
        designs = design([covariances[name] for name in layers], memories, rank)
        # Signs of singular vectors are arbitrary and differ between devices: the first worker's are everyone's.
        for (name, layer), memory, lora_A in zip(layers.items(), memories, map(broadcast, designs), strict=True):
            if len(lora_A) < rank:
                warnings.warn(
                    f"task {data.task.index}: {name} has {len(lora_A)} free directions left, "
                    f"fewer than adapter.rank={self.settings.rank}; using {len(lora_A)}",
                    stacklevel=2,
                )
            train_A = self.settings.train_A
            within = free_projector(memory, covariances[name]) if train_A else None
            layer.attach(lora_A, train_A=train_A, within=within if within is None else broadcast(within))
            self._diagnostics[f"memory/{short_name(name)}/overlap"] = energy_inside(
                covariances[name], memory, energy_of
            )

    def task_parameters(self, model: ContinualModel) -> list[nn.Parameter]:
        return adapter_parameters(model)

    def end_task(self, model: ContinualModel, data: TaskData) -> dict[str, Tensor]:
        """Merge ``merge`` of ``B_t A_t`` into the weights, then remember the directions of this task's inputs."""
        if self.settings.balance is not None and self.inputs:
            self._balance(model, data, self.settings.balance)
        factors = merge_all(model, self.settings.share_merged(data.task.index))
        # Of the merged model's inputs: what later tasks must not disturb is what this one reads from now on.
        covariances = input_covariances(model, data, "after")
        self._remember(covariances, data)
        if self.settings.balance is not None:
            images = len(data.task.train_rows)
            for name, cov_DD in covariances.items():
                inputs_DD = images * cov_DD.cpu()
                self.inputs[name] = self.inputs[name] + inputs_DD if name in self.inputs else inputs_DD
        return factors

    def _balance(self, model: ContinualModel, data: TaskData, weight: float) -> None:
        """Put updates that serve old inputs too in the place of those that were learnt for the new ones alone."""
        # The trained model's inputs, of the same looks at the images as the merged one's later.
        covariances, images = input_covariances(model, data, "after"), len(data.task.train_rows)
        for name, layer in adapted_layers(model):
            factors = layer.detach_adapter()
            assert factors is not None, "the task that ends has begun"
            old_DD = weight * self.inputs[name].to(covariances[name])
            lora_A = balanced(factors[0], images * covariances[name], old_DD)
            layer.attach(broadcast(lora_A), lora_B=factors[1])

    def _remember(self, covariances: dict[str, Tensor], data: TaskData) -> None:
        """DualGPM: take the directions that hold the finished task's inputs out of those that are free."""
        settings, known, share = self.settings, self._diagnostics, self._share(data)
        updated = update(
            [self.memory.get(name) for name in covariances],
            list(covariances.values()),
            share,
            energy_of=settings.energy_of,
            may_flip=settings.memory == "dualgpm",
        )
        self.memory = dict(zip(covariances, map(from_first_worker, updated), strict=True))
        for name, memory in self.memory.items():
            layer, cov_DD = f"memory/{short_name(name)}", covariances[name]
            known[f"{layer}/size"] = float(taken_count(memory, len(cov_DD)))
            known[f"{layer}/kept"] = energy_inside(cov_DD, memory, settings.energy_of)

    def _share(self, data: TaskData) -> float:
        """The share of energy to be kept, which rises from task to task: eps_t of the paper."""
        settings = self.settings
        return threshold(
            data.task.index, settings.total_tasks or data.total_tasks, settings.energy, settings.energy_end
        )

    def diagnostics(self) -> dict[str, float]:
        """Three numbers for each adapted layer.

        ``size``: the directions taken; ``kept``: the share of the task's input energy in them; ``overlap``: the share
        of it that lay in the old memory before the task was learnt.
        """
        return self._diagnostics

    def state(self) -> dict[str, Tensor]:
        taken = {f"{name}.{memory.kind}": memory.basis_DK for name, memory in self.memory.items()}
        return taken | {f"{name}.inputs": inputs_DD for name, inputs_DD in self.inputs.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.memory = memory_of(state)
        self.inputs = {key.removesuffix(".inputs"): t.clone() for key, t in state.items() if key.endswith(".inputs")}

    def state_layout(self, model: ContinualModel, sizes: Sequence[int], names: Collection[str]) -> Layout:
        layout = {}
        for name, layer in adapted_layers(model):
            kind = "retain" if f"{name}.retain" in names else "remove"
            layout[f"{name}.{kind}"] = Spec((layer.in_features, range(layer.in_features + 1)))
            if self.settings.balance is not None:
                layout[f"{name}.inputs"] = Spec((layer.in_features, layer.in_features), torch.float64)
        return layout
