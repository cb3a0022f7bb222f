"""InfLoRA's adapter: whatever is trained of it, old tasks' directions stay untouched; shares and ranks are kept to."""

import pytest
import torch

from inflora.adapters.inflora import InfLoRA
from inflora.config import override
from inflora.continual import run
from inflora.lora import adapted_layers
from inflora.subspace import balanced, design, free_basis
from inflora.training import train_task
from tests.conftest import begun, pair_of, same_tensors


def settings(**changes):
    pair = pair_of("inflora")
    return pair | {"adapter": pair["adapter"] | {"rank": 4} | changes}


@pytest.mark.parametrize("train_A", [False, True])
def test_what_a_later_task_learns_is_orthogonal_to_what_old_tasks_have_taken(train_A, tiny):
    model, adapter, data = begun(tiny, settings(train_A=train_A, energy=0.9), tasks=2)
    assert isinstance(adapter, InfLoRA)
    memories = dict(adapter.memory)
    started = {name: layer.factors()[0].detach().clone() for name, layer in adapted_layers(model)}
    train_task(model, adapter, data, lambda _: None)
    for name, layer in adapted_layers(model):
        lora_A, lora_B = layer.factors()
        free_DF = free_basis(memories[name], layer.in_features).float()
        update = lora_B @ lora_A
        assert update.norm() > 1e-4
        assert (update - update @ free_DF @ free_DF.T).norm() < 1e-5 * update.norm()
        assert torch.equal(lora_A, started[name]) != train_A


def test_a_trained_A_is_confined_when_it_is_merged_too(tiny):
    model, adapter, data = begun(tiny, settings(train_A=True, energy=0.9), tasks=2)
    memories = dict(adapter.memory)
    train_task(model, adapter, data, lambda _: None)
    for name, lora_A in adapter.end_task(model, data).items():
        if name.endswith(".lora_A"):
            basis_DF = free_basis(memories[name.removesuffix(".lora_A")], lora_A.shape[1]).float()
            torch.testing.assert_close(lora_A @ basis_DF @ basis_DF.T, lora_A, atol=1e-5, rtol=0)
    assert all(layer.within is None for _, layer in adapted_layers(model))


def test_in_the_first_task_a_trained_A_goes_anywhere(tiny):
    model, *_ = begun(tiny, settings(train_A=True))
    assert all(layer.within is None for _, layer in adapted_layers(model))


def test_the_first_tasks_share_is_its_own(tiny):
    model, adapter, data = begun(tiny, settings(merge=0.25, first_merge=1.0), tasks=1)
    for task, share in ((0, 1.0), (1, 0.25)):
        assert adapter.settings.share_merged(task) == share
    train_task(model, adapter, data, lambda _: None)
    layers = dict(adapted_layers(model))
    learnt = {name: layer.lora_B.detach().clone() for name, layer in layers.items()}
    merged = adapter.end_task(model, data)
    assert all(torch.equal(merged[f"{name}.lora_B"], lora_B) for name, lora_B in learnt.items())


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_a_rank_that_is_a_share_holds_it_with_as_few_directions_as_can_be(share):
    cov_DD = torch.diag(torch.tensor([8.0, 4, 2, 1, 0.5, 0.1]))
    (lora_A,) = design([cov_DD], [None], share)
    energies = cov_DD.diagonal().square()
    held = energies.cumsum(0) / energies.sum()
    assert len(lora_A) == int((held < share).sum()) + 1
    assert held[len(lora_A) - 1] >= share


def test_an_automatic_rank_is_each_layers_own_and_resumes_bit_for_bit(tiny, digits):
    config = override(tiny, {"adapter.rank": "auto", "adapter.energy": 0.95, "data.tasks": 2})
    first, second = run(config)
    ranks = {len(factor) for name, factor in first.factors.items() if name.endswith("lora_A")}
    assert all(1 <= rank <= 32 for rank in ranks)
    (resumed,) = run(config, first.state)
    assert same_tensors(resumed.state.model, second.state.model)


def test_a_trained_A_resumes_bit_for_bit(tiny, digits):
    config = override(tiny, {"adapter.train_A": True, "adapter.merge": 0.5, "data.tasks": 5})
    results = list(run(config))
    resumed = list(run(config, results[1].state))
    assert same_tensors(resumed[-1].state.model, results[-1].state.model)
    assert same_tensors(resumed[-1].state.adapter, results[-1].state.adapter)


def inputs_along(*directions: int, images: int = 40, width: int = 6) -> torch.Tensor:
    """So many inputs (D x N) that lie along some axes only."""
    inputs_DN = torch.zeros(width, images)
    inputs_DN[list(directions)] = torch.randn(len(directions), images, generator=torch.Generator().manual_seed(0))
    return inputs_DN


def test_a_balanced_update_is_the_nearest_to_what_both_kinds_of_inputs_ask_for():
    random = torch.Generator().manual_seed(1)
    lora_A, lora_B = torch.randn(2, 6, generator=random), torch.randn(5, 2, generator=random)
    old_DN, new_DN = torch.randn(6, 50, generator=random), torch.randn(6, 30, generator=random)
    merged = lora_B @ balanced(lora_A, new_DN @ new_DN.T, old_DN @ old_DN.T)
    asked = torch.cat([torch.zeros(5, 50), lora_B @ lora_A @ new_DN], dim=1)
    nearest = torch.linalg.lstsq(torch.cat([old_DN, new_DN], dim=1).T, asked.T).solution.T
    torch.testing.assert_close(merged, nearest, atol=1e-4, rtol=1e-4)


def test_a_direction_keeps_all_of_an_update_where_no_old_input_lies_and_half_where_both_do_alike():
    new_DN, old_DN, lora_A = inputs_along(0, 1), inputs_along(0, 2), torch.ones(1, 6)
    new_DD = (new_DN @ new_DN.T).diagonal().diag()
    old_DD = torch.zeros(6, 6)
    old_DD[0, 0], old_DD[2, 2] = new_DD[0, 0], (old_DN @ old_DN.T)[2, 2]
    torch.testing.assert_close(balanced(lora_A, new_DD, old_DD), torch.tensor([[0.5, 1, 0, 0, 0, 0]]))


def test_without_old_inputs_a_balanced_update_does_to_the_new_what_was_learnt():
    new_DN, lora_A = inputs_along(0, 1, 2), torch.randn(2, 6, generator=torch.Generator().manual_seed(2))
    kept = balanced(lora_A, new_DN @ new_DN.T, torch.zeros(6, 6))
    torch.testing.assert_close(kept @ new_DN, lora_A @ new_DN, atol=1e-5, rtol=1e-5)


def disturbed(tiny, balance: float | None) -> float:
    """How much a second task's merged update moves what the first one's inputs give, against what was learnt."""
    model, adapter, data = begun(tiny, settings(train_A=True, energy=0.9, balance=balance), tasks=2)
    assert isinstance(adapter, InfLoRA)
    old = {name: inputs_DD.float() for name, inputs_DD in adapter.inputs.items()}
    train_task(model, adapter, data, lambda _: None)
    learnt = {name: (layer.lora_B @ layer.factors()[0]).detach() for name, layer in adapted_layers(model)}
    factors = adapter.end_task(model, data)
    moved = whole = 0.0
    for name, update in learnt.items():
        merged = factors[f"{name}.lora_B"] @ factors[f"{name}.lora_A"]
        old_DD = old.get(name, torch.eye(update.shape[1]))
        moved += float(torch.trace(merged @ old_DD @ merged.T))
        whole += float(torch.trace(update @ old_DD @ update.T))
    return moved / whole


def test_the_more_old_inputs_weigh_the_less_a_merged_update_moves_what_they_give(tiny):
    moved = [disturbed(tiny, balance) for balance in (None, 0.0, 1.0, 10.0)]
    assert moved[0] == 1.0
    # With no weight the update keeps what it does to new inputs, whatever lies where they are not.
    assert moved[1] > 2 * moved[2] > 4 * moved[3]


def test_the_first_task_is_merged_as_it_was_learnt_whatever_the_balance(tiny, digits):
    plain, balanced_run = (next(run(override(tiny, {"adapter.balance": balance}))) for balance in (None, 1.0))
    assert same_tensors(plain.state.model, balanced_run.state.model)
    assert all(name.endswith(".inputs") for name in balanced_run.state.adapter.keys() - plain.state.adapter.keys())
