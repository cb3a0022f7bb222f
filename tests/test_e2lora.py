"""E2-LoRA: old updates let go of outputs that they hardly use, and a new task writes to those alone."""

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from inflora.adapters.e2lora import E2LoRA, Update, still_kept, turned
from inflora.backbone import build_backbone
from inflora.config import RunConfig
from inflora.learner import make_learner
from inflora.lora import adapted_layers
from inflora.model import ContinualModel
from inflora.training import train_task
from tests.conftest import begun, pair_of, task_of_noise


def update_of(*energies: list[float]) -> Update:
    """Tasks whose directions have these energies."""
    energy_O = torch.tensor(list(itertools.chain(*energies)))
    owner_O = torch.arange(len(energies)).repeat_interleave(torch.tensor([len(each) for each in energies]))
    return Update(torch.eye(len(energy_O)), torch.zeros(len(energy_O), 3), energy_O, owner_O)


def kept_by(update: Update) -> list[int]:
    kept_O = still_kept(update)
    return [int(kept_O[update.owner_O == task].sum()) for task in range(int(update.owner_O[-1]) + 1)]


def test_a_task_keeps_its_leading_directions_and_half_are_free_for_the_second():
    assert still_kept(update_of([8.0, 1.0, 0.5, 0.5])).tolist() == [True, True, False, False]


def test_directions_without_energy_are_let_go_even_where_more_could_be_kept():
    assert kept_by(update_of([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])) == [1]


def test_every_task_keeps_one_direction_at_least():
    assert kept_by(update_of([1.0] * 4, [0.0] * 4)) == [4, 1]
    assert kept_by(update_of([1.0], [1.0], [1.0], [1.0], [1.0])) == [1] * 5


@pytest.mark.parametrize("seed", range(20))
def test_old_tasks_keep_what_the_largest_common_share_of_energy_leaves_room_for(seed):
    random = torch.Generator().manual_seed(seed)
    ranks = torch.randint(1, 40, (3,), generator=random).tolist()
    energies = [
        (torch.rand(rank, generator=random) ** 6).sort(descending=True).values.double().tolist() for rank in ranks
    ]
    update, limit = update_of(*energies), sum(ranks) * 3 // 4

    def keeping(share: float) -> list[int]:
        shares = [torch.tensor(each).float().double().cumsum(0) for each in energies]
        return [next(n for n, part in enumerate(each, 1) if part / each[-1] >= share) for each in shares]

    fitting = (kept for step in range(1, 100_001) if sum(kept := keeping(1 - step * 1e-5)) <= limit)
    assert kept_by(update) == next(fitting)


def test_an_update_is_turned_and_stays_the_same_update():
    generator = torch.Generator().manual_seed(0)
    basis_OR = torch.linalg.qr(torch.randn(9, 4, generator=generator)).Q
    A_RD, inputs_ND = torch.randn(4, 6, generator=generator), torch.randn(500, 6, generator=generator)
    update = turned(basis_OR, A_RD, torch.cov(inputs_ND.T, correction=0), 2)
    torch.testing.assert_close(update.basis_OO @ update.A_OD, basis_OR @ A_RD)
    torch.testing.assert_close(update.basis_OO.T @ update.basis_OO, torch.eye(4))
    along_NR = inputs_ND @ (basis_OR @ A_RD).T @ update.basis_OO
    torch.testing.assert_close(torch.cov(along_NR.T, correction=0), torch.diag(update.energy_O), atol=1e-4, rtol=1e-4)
    assert update.energy_O.tolist() == sorted(update.energy_O.tolist(), reverse=True)
    assert update.owner_O.tolist() == [2] * 4


class Learnt(NamedTuple):
    """A model, its adapter, and the weights of its layers before all tasks, after two, and as the third begins."""

    model: ContinualModel
    adapter: E2LoRA
    before: dict[str, Tensor]
    after_two: dict[str, Tensor]
    third: dict[str, Tensor]


def weights(model: ContinualModel) -> dict[str, Tensor]:
    """The adapted outputs' rows of every layer's weight."""
    return {
        name: torch.cat([layer.weight.detach()[rows] for rows in layer.rows]).clone()
        for name, layer in adapted_layers(model)
    }


def merging(share: float) -> dict[str, Any]:
    """The tiny run's settings, of whose updates this share stays."""
    return pair_of("e2lora") | {"adapter.merge": share}


@pytest.fixture(scope="module", params=[1.0, 0.3])
def learnt(tiny: RunConfig, request: pytest.FixtureRequest) -> Learnt:
    fresh = make_learner(tiny, build_backbone(tiny.backbone))[0]
    model, adapter, data = begun(tiny, merging(request.param), 2)
    assert isinstance(adapter, E2LoRA)
    named = {name for name, _ in adapted_layers(model)}
    plain = {name: tensor for name, tensor in fresh.state_dict().items() if name.removesuffix(".weight") in named}
    train_task(model, adapter, data, lambda _: None)
    adapter.end_task(model, data)
    after_two = weights(model)
    adapter.begin_task(model, task_of_noise(2, lr=0.01, epochs=2))
    before = {name: plain[f"{name}.weight"] for name in named}
    return Learnt(model, adapter, before, after_two, weights(model))


def test_the_weights_are_the_pretrained_ones_and_what_the_tasks_still_keep(learnt):
    for name, update in learnt.adapter.kept.items():
        torch.testing.assert_close(
            learnt.third[name], learnt.before[name] + update.basis_OO @ update.A_OD, atol=1e-5, rtol=1e-5
        )


def test_a_new_task_is_given_all_that_is_let_go_and_that_is_its_share_at_least(learnt):
    for name, layer in adapted_layers(learnt.model):
        kept_OR = learnt.adapter.kept[name].basis_OO
        assert layer.lora_B is not None and not layer.lora_B.requires_grad
        outputs = sum(layer.sizes)
        assert kept_OR.shape[1] + layer.lora_B.shape[1] == outputs and 3 * layer.lora_B.shape[1] >= outputs
        together_OO = torch.cat([kept_OR, layer.lora_B], dim=1)
        torch.testing.assert_close(together_OO.T @ together_OO, torch.eye(outputs), atol=1e-5, rtol=0)


def test_a_task_begins_with_no_update_of_its_own(learnt):
    assert not any(layer.lora_A.any() for _, layer in adapted_layers(learnt.model) if layer.lora_A is not None)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_what_a_task_changes_is_orthogonal_to_what_old_ones_keep(tiny, share):
    model, adapter, data = begun(tiny, merging(share), 3)
    assert isinstance(adapter, E2LoRA)
    old, begin = dict(adapter.kept), weights(model)
    train_task(model, adapter, data, lambda _: None)
    adapter.end_task(model, data)
    for name, weight in weights(model).items():
        changed_OD = weight - begin[name]
        assert changed_OD.any()
        torch.testing.assert_close(
            old[name].basis_OO.T @ changed_OD,
            torch.zeros(old[name].basis_OO.shape[1], changed_OD.shape[1]),
            atol=1e-5,
            rtol=0,
        )


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_the_factors_of_a_task_are_the_whole_change_of_the_weights(tiny, share):
    model, adapter, data = begun(tiny, merging(share), 1)
    train_task(model, adapter, data, lambda _: None)
    adapter.end_task(model, data)
    first = weights(model)
    later = task_of_noise(1, lr=0.01, epochs=2)
    model.classifier.begin_task(later)
    adapter.begin_task(model, later)
    train_task(model, adapter, later, lambda _: None)
    factors = adapter.end_task(model, later)
    for name, weight in weights(model).items():
        change_OD = factors[f"{name}.lora_B"] @ factors[f"{name}.lora_A"]
        torch.testing.assert_close(weight, first[name] + change_OD, atol=1e-5, rtol=1e-5)
