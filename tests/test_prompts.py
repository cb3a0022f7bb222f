"""Prompts in a frozen vision transformer: prefixes in attention, tokens before it, and how they are matched."""

import math
from contextlib import nullcontext

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from inflora.adapters import make_adapter
from inflora.adapters.prompts import codaprompt
from inflora.adapters.prompts.base import similarity
from inflora.adapters.prompts.codaprompt import ComponentPrompts, orthogonal_rows, overlap
from inflora.adapters.prompts.dualprompt import DualPrompts
from inflora.adapters.prompts.l2p import PromptPool
from inflora.classifiers import make_classifier
from inflora.config import (
    CODAPromptSettings,
    ConfigError,
    DataSettings,
    DualPromptSettings,
    L2PSettings,
    LinearSettings,
    parse_config,
)
from inflora.continual import TaskResult, run
from inflora.data.loader import InputFormat, evaluation_batches
from inflora.data.stream import make_stream
from inflora.model import ContinualModel
from inflora.prompts import Prompts, make_promptable, prefixed, prepended_features, query

SMALL = {"img_size": 16, "patch_size": 8, "in_chans": 1, "embed_dim": 12, "depth": 3, "num_heads": 2, "num_classes": 0}
VARIANTS = pytest.mark.parametrize(
    "variant",
    [
        {},
        {"class_token": False, "global_pool": "avg"},
        {"class_token": False, "global_pool": "map"},
        {"reg_tokens": 2},
        {"qk_norm": True, "qkv_bias": False},
        {"init_values": 0.1, "pre_norm": True},
    ],
    ids=lambda variant: ",".join(f"{k}={v}" for k, v in variant.items()) or "plain",
)
ADAPTERS = pytest.mark.parametrize(
    "settings",
    [
        L2PSettings(pool=4, length=2, top=2),
        DualPromptSettings(general_blocks=1, expert_blocks=2, expert_length=3),
        CODAPromptSettings(components=2, length=4, blocks=3),
    ],
    ids=lambda settings: settings.name,
)
IMAGES = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def vit_of(variant: dict | None = None) -> VisionTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VisionTransformer(**(SMALL | (variant or {}))).eval().requires_grad_(False)


def penalty_of(prompts: Prompts, vit: VisionTransformer) -> float:
    """What a batch's loss is increased by."""
    (penalty,) = prompts(vit, IMAGES).penalties
    return penalty.item()


@VARIANTS
def test_without_a_prefix_a_promptable_model_is_the_plain_one(variant):
    vit = vit_of(variant)
    plain, names = vit(IMAGES), list(vit.state_dict())
    make_promptable(vit, 3, "adapter.blocks")
    assert torch.equal(vit(IMAGES), plain)
    assert list(vit.state_dict()) == names


@VARIANTS
def test_a_prefix_that_repeats_the_images_own_keys_and_values_changes_nothing(variant):
    """Softmax over every key twice is softmax over every key once: the prefix is read as keys and values."""
    vit = vit_of(variant)
    make_promptable(vit, 1, "adapter.blocks")
    attention, read = vit.blocks[0].attn, []
    handle = attention.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    plain = vit(IMAGES)
    handle.remove()
    _, k, v = attention.qkv(read[0]).chunk(3, dim=-1)
    k = attention.k_norm(k.unflatten(-1, (2, 6))).flatten(-2)
    with prefixed(vit, {0: (k, v)}):
        torch.testing.assert_close(vit(IMAGES), plain, atol=1e-5, rtol=1e-5)
    with prefixed(vit, {0: (10 * k[:, :1], v[:, :1])}):
        assert not torch.allclose(vit(IMAGES), plain)
    assert torch.equal(vit(IMAGES), plain)


def test_a_prefix_is_gone_after_an_exception():
    vit = vit_of()
    make_promptable(vit, 1, "adapter.blocks")
    with pytest.raises(RuntimeError), prefixed(vit, {0: (torch.zeros(1, 12), torch.zeros(1, 12))}):
        raise RuntimeError
    assert vit.blocks[0].attn.prefix is None


@VARIANTS
def test_tokens_put_before_the_images_reach_the_blocks_and_their_outputs_are_averaged(variant):
    vit, tokens = vit_of(variant), torch.randn(6, 2, 12)
    seen = []
    handle = vit.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    features = prepended_features(vit, IMAGES, tokens)
    vit(IMAGES)
    handle.remove()
    prompted, plain = seen
    torch.testing.assert_close(prompted[:, 2:], plain)
    torch.testing.assert_close(prompted[:, :2], vit.norm_pre(tokens))
    assert features.shape == (6, 12)


@VARIANTS
@ADAPTERS
def test_every_prompt_adapter_runs_on_every_kind_of_vision_transformer(variant, settings):
    model = ContinualModel(vit_of(variant), make_classifier(LinearSettings(), 12))
    make_adapter(settings).prepare(model)
    model.prompts.begin(model.backbone, 0, seed=0)
    features, (penalty,) = model.prompts(model.backbone, IMAGES, 0)
    (features.square().mean() + penalty).backward()
    assert all(parameter.grad is not None for parameter in model.prompts.parameters())
    assert not torch.allclose(features, query(model.backbone, IMAGES))


def test_an_image_picks_the_prompts_with_the_nearest_keys():
    vit, prompts = vit_of(), PromptPool(L2PSettings(pool=6, length=1, top=1, pull=0.5))
    prompts.begin(vit, 0, seed=0)
    queries = query(vit, IMAGES)
    with torch.no_grad():
        prompts.get_parameter("keys_PD").copy_(3 * queries)
    features, (penalty,) = prompts(vit, IMAGES)
    assert penalty.item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(features, prepended_features(vit, IMAGES, prompts.get_parameter("pool_PLD")))


def test_keys_are_compared_in_float32_while_the_backbone_runs_in_bfloat16():
    """Two keys whose cosines with the query, 1 and 0.99995, are one number in bfloat16."""
    query_BD, keys_KD = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.01], [1.0, 0.0]])
    with torch.autocast("cpu", torch.bfloat16):
        match_BK = similarity(query_BD.bfloat16(), keys_KD)
    assert torch.equal(match_BK, similarity(query_BD, keys_KD)) and match_BK.argmax(1).tolist() == [1]


def test_component_weights_and_the_overlap_are_in_float32_while_the_backbone_runs_in_bfloat16(monkeypatch):
    vit = vit_of()
    make_promptable(vit, 1, "adapter.blocks")
    prompts = ComponentPrompts(CODAPromptSettings(components=2, length=2, blocks=1, orthogonality=0.5))
    prompts.begin(vit, 0, seed=0)
    with torch.no_grad():
        for parameter in prompts.parameters():
            parameter.copy_(torch.randn_like(parameter))
    seen, queries = [], query(vit, IMAGES).bfloat16()
    monkeypatch.setattr(codaprompt, "query", lambda vit, images: queries)
    monkeypatch.setattr(codaprompt, "prefixed", lambda vit, given: seen.append(given[0]) or nullcontext())
    exact = prompts(vit, IMAGES).penalties
    with torch.autocast("cpu", torch.bfloat16):
        assert prompts(vit, IMAGES).penalties == exact
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))


def test_the_expert_of_the_nearest_key_is_asked_when_the_task_is_not_known():
    vit = vit_of()
    make_promptable(vit, 2, "adapter.blocks")
    prompts = DualPrompts(DualPromptSettings(general_blocks=1, expert_blocks=1))
    for task in range(2):
        prompts.begin(vit, task, seed=0)
    with torch.no_grad():
        prompts.get_parameter("key_1").copy_(query(vit, IMAGES).mean(0))
        prompts.get_parameter("key_0").copy_(-query(vit, IMAGES).mean(0))
        for task in range(2):
            prompts.get_parameter(f"expert_{task}").mul_(100)
    asked, first, second = (prompts(vit, IMAGES, task).features for task in (None, 0, 1))
    assert torch.equal(asked, second)
    assert not torch.allclose(first, second)


def experts_asked(last: TaskResult, data: DataSettings) -> float:
    """The share of validation images whose nearest key is that of their own task."""
    stream, model = make_stream(data, "validation"), last.model
    keys, right = torch.stack(model.prompts.of_tasks("key")), []
    for task in stream.tasks:
        input_format = InputFormat(data, 32, 1, torch.device("cpu"))
        for batch in evaluation_batches(stream.evaluate, task.eval_rows, input_format, 256):
            nearest = similarity(query(model.backbone, batch.images), keys).argmax(1)
            right.append(nearest == task.index)
    return torch.cat(right).float().mean().item()


@pytest.mark.parametrize(("key_lr", "shares"), [({}, (0.7, 1)), ({"key_lr": None}, (0, 0.6))], ids=["default", "as lr"])
def test_keys_come_to_their_tasks_queries_and_ask_the_right_expert(key_lr, shares, digits):
    """Real digits, ten tasks of one epoch. At the prompts' own small rate the keys stay near their beginnings."""
    settings = {
        "data": {"tasks": 10, "augment": "none"},
        "adapter": {"name": "dualprompt", **key_lr},
        "optim": {"epochs": 1, "lr": 2e-4, "batch_size": 16},
        "device": "cpu",
    }
    config = parse_config(settings)
    *_, last = run(config)
    lowest, highest = shares
    assert lowest < experts_asked(last, config.data) < highest


def test_only_the_newest_expert_and_components_are_trained():
    vit = vit_of()
    make_promptable(vit, 3, "adapter.blocks")
    dual, coda = DualPrompts(DualPromptSettings(expert_blocks=1)), ComponentPrompts(CODAPromptSettings(blocks=1))
    for prompts in (dual, coda):
        for task in range(2):
            prompts.requires_grad_(False)
            prompts.begin(vit, task, seed=0)
    assert {n for n, p in dual.named_parameters() if p.requires_grad} == {"general_G2LW", "expert_1", "key_1"}
    assert {n for n, p in coda.named_parameters() if p.requires_grad} == {"components_1", "keys_1", "attentions_1"}


def test_component_weights_are_cosines_with_the_attended_query():
    """One component with attention one: its weight is the cosine of query and key; half is keys, half is values."""
    vit = vit_of()
    make_promptable(vit, 1, "adapter.blocks")
    prompts = ComponentPrompts(CODAPromptSettings(components=1, length=2, blocks=1))
    prompts.begin(vit, 0, seed=0)
    with torch.no_grad():
        prompts.get_parameter("attentions_0").fill_(1)
    key, component = prompts.get_parameter("keys_0")[0, 0], prompts.get_parameter("components_0")[0, 0].view(2, 12)
    weight = nn.functional.cosine_similarity(query(vit, IMAGES), key[None])
    prompt = weight[:, None, None] * component
    with prefixed(vit, {0: (prompt[:, :1], prompt[:, 1:])}):
        expected = vit(IMAGES)
    torch.testing.assert_close(prompts(vit, IMAGES).features, expected)


def test_components_start_orthogonal_to_each_other_and_to_the_old_ones_while_there_is_room():
    old = orthogonal_rows(5, torch.zeros(0, 12), torch.Generator().manual_seed(0))
    new = orthogonal_rows(7, old, torch.Generator().manual_seed(1))
    both = torch.cat([old, new])
    torch.testing.assert_close(both @ both.T, torch.eye(12), atol=1e-5, rtol=0)
    full = orthogonal_rows(3, both, torch.Generator().manual_seed(2))
    torch.testing.assert_close(full.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("name", ["components", "keys", "attentions"])
def test_the_penalty_is_the_mean_squared_overlap_in_a_block_summed_over_blocks_and_parts(name):
    vit = vit_of()
    make_promptable(vit, 2, "adapter.blocks")
    prompts = ComponentPrompts(CODAPromptSettings(components=2, length=2, blocks=2, orthogonality=0.5))
    prompts.begin(vit, 0, seed=0)
    assert penalty_of(prompts, vit) == pytest.approx(0, abs=1e-5)
    rows = prompts.get_parameter(f"{name}_0")
    with torch.no_grad():
        rows.fill_(1 / math.sqrt(rows.shape[-1]))  # in both blocks the two rows are one: the Gram matrix is all ones
    assert penalty_of(prompts, vit) == pytest.approx(0.5 * 2 * (0 + 1 + 1 + 0) / 4, abs=1e-4)


def test_overlap_of_tiny_rows_by_hand():
    rows = torch.tensor([[[1.0, 0.0], [0.6, 0.8]], [[2.0, 0.0], [0.0, 1.0]]])
    # [[1, .6], [.6, 1]] - 1 has squares 0, .36, .36, 0; [[4, 0], [0, 1]] - 1 has 9, 0, 0, 0.
    assert overlap(rows).item() == pytest.approx(0.72 / 4 + 9 / 4)


def test_too_many_blocks_are_refused_by_the_name_of_the_setting():
    with pytest.raises(ConfigError, match=r"adapter\.blocks must be at most the backbone's depth 3, got 4"):
        make_promptable(vit_of(), 4, "adapter.blocks")


def test_attention_of_another_kind_is_refused():
    vit = vit_of()
    vit.blocks[1].attn = nn.Identity()
    with pytest.raises(ConfigError, match=r"cannot be prompted: blocks\.1 has no plain attention"):
        make_promptable(vit, 2, "adapter.blocks")
