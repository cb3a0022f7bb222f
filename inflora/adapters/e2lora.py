"""E2-LoRA: old updates let go of outputs that they hardly use, and new tasks write to those (arXiv 2605.27482).

The part of it that adapts: the paper's distillation from the old model is a loss of its own, its classifiers are
aligned (``classifier=aligned``). It looks at one batch to see what an update does to a layer's outputs, here all of the
task's images are seen.
Shapes: O adapted outputs of a layer, D width of its input, R rank, T tasks.
"""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from inflora.adapters.base import Adapter
from inflora.adapters.covariances import input_covariances
from inflora.config import E2LoRASettings
from inflora.distributed import broadcast
from inflora.injection import inject
from inflora.layout import Layout, Spec
from inflora.lora import adapted_layers, adapter_parameters, merge_all, short_name
from inflora.model import ContinualModel
from inflora.task_data import TaskData

_STEP = 1e-5
"""Between the shares of energy that are tried, from 1 down."""


class Update(NamedTuple):
    """All that a layer's tasks have added to its weight, ``basis_OO A_OD``, direction by direction of its outputs.

    Directions (columns of the orthonormal basis) are owned by tasks; ``energy_O`` is the variance along each that the
    update of its owner, ``owner_O``, gave the outputs. Sorted by owner, then by energy, the largest first.
    """

    basis_OO: Tensor
    A_OD: Tensor
    energy_O: Tensor
    owner_O: Tensor

    def part(self, chosen_O: Tensor) -> "Update":
        """Some of the directions."""
        return Update(self.basis_OO[:, chosen_O], self.A_OD[chosen_O], self.energy_O[chosen_O], self.owner_O[chosen_O])


class E2LoRA(Adapter[E2LoRASettings]):
    """The first task trains an update of full rank; each later one in directions that all before it have let go.

    Before task t the old ones keep at most (t - 1) / t of a layer's outputs. A task's B is made of the directions that
    they let go, whose updates are taken back, and stays as it is; its A begins at zero. So what a new task writes is
    orthogonal to what old ones keep. It remembers O (O + D) numbers of every layer: 0.9 GB of ViT-B/16's q, k, v and
    mlp.fc1.
    """

    passes = ("covariance-after",)
    is_trained = True

    def __init__(self, settings: E2LoRASettings) -> None:
        super().__init__(settings)
        self.kept: dict[str, Update] = {}
        self.released: dict[str, Update] = {}
        self._diagnostics: dict[str, float] = {}

    def prepare(self, model: ContinualModel) -> None:
        inject(model.backbone, self.settings.blocks, self.settings.targets)

    def begin_task(self, model: ContinualModel, data: TaskData) -> None:
        self._diagnostics = {}
        for name, layer in adapted_layers(model):
            if name in self.kept:
                update = Update(*(part.to(layer.weight.device) for part in self.kept[name]))
                kept_O = still_kept(update)
                self.kept[name], released = update.part(kept_O), update.part(~kept_O)
                self.released[name] = released
                layer.fold_in(-released.A_OD, released.basis_OO)
                layer.attach(torch.zeros_like(released.A_OD), train_A=True, lora_B=released.basis_OO)
            else:
                bound, shape = layer.in_features**-0.5, (sum(layer.sizes), layer.in_features)
                generator = data.draws.generator(data.task.index, "lora_A", name)
                layer.attach(torch.empty(shape).uniform_(-bound, bound, generator=generator), train_A=True)
            assert layer.lora_A is not None
            self._diagnostics[f"rank/{short_name(name)}"] = float(len(layer.lora_A))

    def task_parameters(self, model: ContinualModel) -> list[nn.Parameter]:
        return adapter_parameters(model)

    def end_task(self, model: ContinualModel, data: TaskData) -> dict[str, Tensor]:
        """Merge ``merge`` of the update, and turn its directions so that their energies are far apart.

        What comes back is the whole change of the weights: where an old update was let go, that is taken off.
        """
        share = self.settings.share_merged(data.task.index)
        factors = merge_all(model, share)
        covariances = input_covariances(model, data, "after", centred=True)
        for name, cov_DD in covariances.items():
            lora_A, lora_B = factors[f"{name}.lora_A"], factors[f"{name}.lora_B"]
            if name in self.released:
                # The share belongs to A: the basis stays orthonormal.
                released, merged_A = self.released.pop(name), share * lora_A
                update = joined(self.kept[name], turned(released.basis_OO, merged_A, cov_DD, data.task.index))
                factors[f"{name}.lora_A"], factors[f"{name}.lora_B"] = merged_A - released.A_OD, released.basis_OO
            else:
                update = turned(torch.eye(len(lora_B)).to(lora_B), lora_B @ lora_A, cov_DD, data.task.index)
            self.kept[name] = Update(*(broadcast(part).cpu() for part in update))
        return factors

    def diagnostics(self) -> dict[str, float]:
        """``rank/<layer>``: the number of directions that the task was given."""
        return self._diagnostics

    def state(self) -> dict[str, Tensor]:
        return {f"{name}.{kind}": part for name, update in self.kept.items() for kind, part in update._asdict().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        names = dict.fromkeys(key.rpartition(".")[0] for key in state)
        self.kept = {name: Update(*(state[f"{name}.{kind}"] for kind in Update._fields)) for name in names}

    def state_layout(self, model: ContinualModel, sizes: Sequence[int], names: Collection[str]) -> Layout:
        layout: dict[str, Spec] = {}
        for name, layer in adapted_layers(model):
            outputs = sum(layer.sizes)
            shapes = (outputs, outputs), (outputs, layer.in_features), (outputs,)
            specs = *map(Spec, shapes), Spec((outputs,), torch.int64)
            layout |= {f"{name}.{kind}": spec for kind, spec in zip(Update._fields, specs, strict=True)}
        return layout


def turned(basis_OR: Tensor, A_RD: Tensor, cov_DD: Tensor, task: int) -> Update:
    """A task's update ``basis_OR A_RD`` along the principal directions of what it adds to the outputs.

    ``basis_OR`` is orthonormal, ``cov_DD`` the covariance of the inputs.
    """
    A_RD = A_RD.double()
    energy_R, directions_RR = torch.linalg.eigh(A_RD @ cov_DD.to(A_RD) @ A_RD.T)
    energy_R, directions_RR = energy_R.flip(0).clamp_min(0), directions_RR.flip(1)
    owner_R = torch.full((len(energy_R),), task, device=energy_R.device)
    turned_OR, turned_RD = basis_OR.double() @ directions_RR, directions_RR.T @ A_RD
    return Update(turned_OR.float(), turned_RD.float(), energy_R.float(), owner_R)


def joined(old: Update, new: Update) -> Update:
    """The directions of both."""
    basis = torch.cat([old.basis_OO, new.basis_OO], dim=1)
    return Update(basis, *(torch.cat(parts) for parts in zip(old[1:], new[1:], strict=True)))


def still_kept(update: Update) -> Tensor:
    """Which directions (O) T old tasks keep when the next one begins.

    Every task keeps the fewest of its leading directions that hold a share of its energy, at least one. The share is
    the same for all tasks: the largest, in steps from 1 down, with which they keep at most T / (T + 1) of all.
    """
    tasks, ranks = update.owner_O.unique_consecutive(return_counts=True)
    sums = [energy.double().cumsum(0) for energy in update.energy_O.split(ranks.tolist())]
    shares = [sums_R / sums_R[-1] if sums_R[-1] > 0 else torch.ones_like(sums_R) for sums_R in sums]
    limit = len(update.owner_O) * len(tasks) // (len(tasks) + 1)

    def kept(step: int) -> list[int]:
        least = 1 - step * _STEP
        return [min(int((share < least).sum()) + 1, len(share)) for share in shares]

    steps = range(1, round(1 / _STEP) + 1)
    # The larger the step the fewer are kept: the first with few enough, or the last.
    step = min(bisect_left(steps, True, key=lambda step: sum(kept(step)) <= limit), len(steps) - 1)
    places = [torch.arange(rank) < keep for rank, keep in zip(ranks.tolist(), kept(steps[step]), strict=True)]
    return torch.cat(places).to(update.owner_O.device)
