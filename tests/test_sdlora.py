"""SD-LoRA: directions of old tasks stay, and their magnitudes go on learning from where they are."""

import torch
from torch import nn

from inflora.adapters.sdlora import DecoupledLinear, decoupled_layers
from inflora.training import train_task
from tests.conftest import begun, pair_of, task_of_noise


def test_old_magnitudes_start_at_one_change_nothing_as_a_task_begins_and_are_learnt_on(tiny):
    images = torch.rand(4, 1, 32, 32)
    model, adapter, data = begun(tiny, pair_of("sdlora"), 1, epochs=3)
    train_task(model, adapter, data, lambda _: None)
    before = model.features(images)
    adapter.end_task(model, data)
    torch.testing.assert_close(model.features(images), before)
    data = task_of_noise(1, lr=1e-6, epochs=2)
    model.classifier.begin_task(data)
    adapter.begin_task(model, data)
    torch.testing.assert_close(model.features(images), before)
    magnitudes = [layer.magnitudes for _, layer in decoupled_layers(model)]
    assert all(torch.equal(each, torch.ones(1)) for each in magnitudes)
    steps = 2 * 3  # of Adam, which moves a parameter by its rate or less
    train_task(model, adapter, data, lambda _: None)
    moved = torch.cat([(each.detach() - 1).abs() for each in magnitudes])
    assert (moved > 0.1 * steps * 1e-3).any() and (moved < 1.1 * steps * 1e-3).all()


def test_the_merged_weight_of_decoupled_directions_is_the_sum_of_their_updates_times_their_magnitudes():
    layer = DecoupledLinear(nn.Linear(5, 4))
    weight, expected = layer.weight.detach().clone(), layer.weight.detach().clone()
    for _ in range(2):
        layer.attach(torch.randn(2, 5), train_A=True)
        with torch.no_grad():
            layer.lora_B.normal_()
        expected += layer.lora_B.detach() @ layer.lora_A.detach()
        layer.keep(1.0)
    torch.testing.assert_close(layer.merged_weight(), expected)
    with torch.no_grad():
        layer.magnitudes.fill_(3)
    torch.testing.assert_close(layer.merged_weight(), weight + 3 * (expected - weight))
    images = torch.randn(7, 5)
    torch.testing.assert_close(layer(images), images @ layer.merged_weight().T + layer.bias)
