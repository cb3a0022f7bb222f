"""The last block for the class token alone: the numbers of plain timm, and left alone where other tokens count."""

import copy

import pytest
import torch
from timm.layers import StdConv2d
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from inflora.class_token import ClassTokenBlock, hold_weights, read_class_token_only
from inflora.config import Target
from inflora.covariance import gather_covariance
from inflora.injection import inject
from inflora.lora import adapted_layers, adapter_parameters

SHAPE = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 0}
KINDS = {
    "plain": {},
    "normalised queries and keys": {"qk_norm": True},
    "scaled layers": {"init_values": 0.1},
    "register tokens": {"reg_tokens": 3},
    "no bias": {"qkv_bias": False},
    "a norm behind pooling": {"fc_norm": True},
}
OTHERS = {
    "mean of all tokens": {"global_pool": "avg", "class_token": False},
    "attention pooling": {"global_pool": "map"},
}


def pair(targets: tuple[Target, ...] = (), **options) -> tuple[VisionTransformer, VisionTransformer]:
    """The same model twice, with trained adapters: as timm has it, and reading the class token only."""
    plain = VisionTransformer(**SHAPE, **options).eval().requires_grad_(False)
    if targets:
        inject(plain, targets=targets)
    for _, layer in adapted_layers(plain):
        layer.attach(torch.randn(3, layer.in_features), train_A=True)
        torch.nn.init.normal_(layer.lora_B)
    reading = copy.deepcopy(plain)
    read_class_token_only(reading)
    return plain, reading


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16)


@pytest.mark.parametrize("targets", [(), ("k", "v"), ("q",), ("q", "v"), ("q", "k", "v")], ids=str)
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_features_and_gradients_are_those_of_plain_timm(options, targets):
    x, models = images().double(), [model.double() for model in pair(targets, **options)]
    assert isinstance(models[1].blocks[-1], ClassTokenBlock)
    features = [model(x) for model in models]
    torch.testing.assert_close(*features, rtol=1e-12, atol=1e-12)
    if targets:
        direction = torch.randn(32).double()
        for feature in features:
            (feature @ direction).sum().backward()
        for ours, theirs in zip(*map(adapter_parameters, models), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)


def test_a_model_that_reads_a_second_token_is_left_alone():
    distilled = VisionTransformerDistilled(**SHAPE).eval()
    expected = distilled(x := images())
    read_class_token_only(distilled)
    assert torch.equal(distilled(x), expected)


def test_layers_that_compute_with_their_weights_first_keep_them():
    model = torch.nn.Sequential(StdConv2d(3, 4, 2), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    hold_weights(model, torch.bfloat16)
    assert [module.weight.dtype for module in (model[0], model[2])] == [torch.float32, torch.bfloat16]


def test_the_other_tokens_are_not_computed():
    _, reading = pair()
    assert reading.forward_features(images()).shape == (3, 1, 32)


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_where_other_tokens_are_pooled_nothing_changes(options):
    plain, reading = pair(**options)
    assert type(reading.blocks[-1]) is type(plain.blocks[-1])
    assert torch.equal(plain(images := torch.randn(2, 3, 16, 16)), reading(images))


@pytest.mark.parametrize("target", ["attn.proj", "mlp.fc1", "mlp.fc2"])
def test_where_layers_behind_the_attention_are_adapted_nothing_changes(target):
    _, reading = pair(("k", target))
    assert not isinstance(reading.blocks[-1], ClassTokenBlock)


def test_covariances_are_those_of_all_tokens():
    x, gathered = images(), []
    for model in pair(("k", "v")):
        with torch.no_grad(), gather_covariance(model) as seen:
            model(x)
        gathered.append(seen)
    for name, covariance in gathered[0].items():
        assert gathered[1][name].count == covariance.count == 3 * 5
        torch.testing.assert_close(gathered[1][name].sum_DD, covariance.sum_DD)


@pytest.mark.parametrize("targets", [(), ("k", "v"), ("q", "mlp.fc1")], ids=str)
def test_held_weights_give_the_bits_of_weights_cast_in_every_forward(targets):
    cast, _ = pair(targets)
    held = copy.deepcopy(cast)
    hold_weights(held, torch.bfloat16)
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cast(x), held(x))
    for (_, ours), (_, theirs) in zip(adapted_layers(held), adapted_layers(cast), strict=True):
        ours.merge()
        theirs.merge()
        assert ours.weight.dtype == torch.float32
        assert torch.equal(ours.weight, theirs.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cast(x), held(x))
