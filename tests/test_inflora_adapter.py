"""InfLoRA's adapter: whatever is trained of it, old tasks' directions stay untouched; shares and ranks are kept to."""

import pytest
import torch

from inflora.adapters.inflora import InfLoRA
from inflora.config import override
from inflora.continual import run
from inflora.lora import adapted_layers
from inflora.subspace import design, free_basis
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
