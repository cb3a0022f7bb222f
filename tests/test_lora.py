"""The adapter on a fused qkv layer: keys and values only, the identity at the start, merged at the end."""

import copy

import pytest
import torch
from torch import nn

from inflora.config import ConfigError
from inflora.injection import inject
from inflora.lora import LoRALinear, adapted_layers, merge_all

WIDTH, RANK = 8, 3
LAYERS = pytest.mark.parametrize("plain", [(WIDTH, True), (WIDTH, False), (12, True)], indirect=True, ids=str)


@pytest.fixture
def plain(request) -> nn.Linear:
    """A fused qkv layer; parametrised by the attention's width and whether it has a bias."""
    attention_width, bias = getattr(request, "param", (WIDTH, True))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(WIDTH, 3 * attention_width, bias=bias)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))


def on_keys_and_values(plain: nn.Linear) -> LoRALinear:
    width = plain.out_features // 3
    return LoRALinear(plain, (slice(width, 3 * width),))


def adapted(plain: nn.Linear) -> LoRALinear:
    """The layer with an adapter that has learnt something."""
    generator = torch.Generator().manual_seed(2)
    layer = on_keys_and_values(copy.deepcopy(plain))
    layer.attach(torch.randn(RANK, WIDTH, generator=generator))
    assert layer.lora_B is not None
    nn.init.normal_(layer.lora_B, generator=generator)
    return layer


def block(qkv: nn.Module | None) -> nn.Module:
    """As much of a transformer block as an adapter needs."""
    made = nn.Module()
    made.attn = nn.Module()
    if qkv is not None:
        made.attn.qkv = qkv
    return made


def stack(*qkvs: nn.Module | None) -> nn.Module:
    vit = nn.Module()
    vit.blocks = nn.Sequential(*map(block, qkvs))
    return vit


@LAYERS
def test_without_an_adapter_the_layer_is_the_plain_one(plain, x):
    assert torch.equal(on_keys_and_values(plain)(x), plain(x))


@LAYERS
def test_an_adapter_starts_as_the_identity(plain, x):
    layer = on_keys_and_values(plain)
    layer.attach(torch.randn(RANK, WIDTH))
    assert torch.equal(layer(x), plain(x))


@LAYERS
def test_an_adapter_adds_B_A_to_keys_and_values_and_nothing_to_queries(plain, x):
    layer = adapted(plain)
    (q, k, v), (plain_q, plain_k, plain_v) = layer(x).chunk(3, -1), plain(x).chunk(3, -1)
    for_keys, for_values = layer.lora_B.chunk(2)
    assert torch.equal(q, plain_q)
    torch.testing.assert_close(k, plain_k + x @ layer.lora_A.T @ for_keys.T)
    torch.testing.assert_close(v, plain_v + x @ layer.lora_A.T @ for_values.T)


@LAYERS
def test_merged_and_unmerged_forward_agree(plain, x):
    layer = adapted(plain)
    unmerged = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), unmerged)
    assert not torch.allclose(layer(x), plain(x))


@LAYERS
def test_merging_leaves_the_query_rows_and_the_bias_bit_for_bit(plain):
    layer = adapted(plain)
    layer.merge()
    rows = plain.out_features // 3
    assert torch.equal(layer.weight[:rows], plain.weight[:rows])
    assert not torch.equal(layer.weight[rows:], plain.weight[rows:])
    assert (layer.bias is None and plain.bias is None) or torch.equal(layer.bias, plain.bias)


def test_merging_a_second_time_changes_nothing(plain):
    layer = adapted(plain)
    layer.merge()
    before = layer.weight.clone()
    layer.merge()
    assert torch.equal(layer.weight, before)


def test_after_merging_the_layer_is_as_large_as_the_plain_one(plain):
    layer = adapted(plain)
    layer.merge()
    assert {n: p.shape for n, p in layer.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}


@LAYERS
def test_the_parameters_keep_the_plain_layers_names(plain):
    layer = on_keys_and_values(plain)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    layer.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("train_A", [False, True])
def test_gradients_reach_B_always_and_A_only_when_asked(plain, x, train_A):
    layer = on_keys_and_values(plain.requires_grad_(False))
    layer.attach(torch.randn(RANK, WIDTH), train_A=train_A)
    layer(x).square().sum().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {"lora_B"} | (
        {"lora_A"} if train_A else set()
    )


@pytest.mark.parametrize("rows", [(slice(8, 24),), (slice(0, 8), slice(16, 24))], ids=["k,v", "q,v"])
@pytest.mark.parametrize("train_A", [False, True])
def test_the_gradients_are_those_of_the_written_out_sum(plain, x, rows, train_A):
    plain, x = plain.double().requires_grad_(False), x.double()  # so that rounding is none of the difference
    layer = LoRALinear(plain, rows)
    layer.attach(torch.randn(RANK, WIDTH), train_A=train_A)
    nn.init.normal_(layer.lora_B)
    trained = [layer.lora_B] + ([layer.lora_A] if train_A else [])
    x = x.requires_grad_()
    update = x @ layer.lora_A.T @ layer.lora_B.T
    written_out = plain(x)
    for part, added in zip(rows, update.chunk(len(rows), -1), strict=True):
        written_out = torch.cat(
            [written_out[..., : part.start], written_out[..., part] + added, written_out[..., part.stop :]], -1
        )
    ours, theirs = (torch.autograd.grad(out.square().sum(), [x, *trained]) for out in (layer(x), written_out))
    torch.testing.assert_close(ours, theirs)


def test_only_the_low_rank_reading_of_the_input_is_kept_for_the_backward(plain, x):
    layer = on_keys_and_values(plain.requires_grad_(False))
    layer.attach(torch.randn(RANK, WIDTH))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        layer(x.requires_grad_())
    assert max(kept) <= layer.weight.numel()
    assert sum(kept) <= layer.weight.numel() + layer.lora_A.numel() + layer.lora_B.numel() + x.numel() // WIDTH * RANK


def test_in_bf16_autocast_the_adapter_agrees_with_float32_and_its_gradient_is_float32(plain, x):
    layer = adapted(plain.requires_grad_(False))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), rtol=0.05, atol=0.05)
    out.float().square().sum().backward()
    in_bf16, layer.lora_B.grad = layer.lora_B.grad, None
    layer(x).square().sum().backward()
    assert in_bf16.dtype == torch.float32
    assert torch.cosine_similarity(in_bf16.flatten(), layer.lora_B.grad.flatten(), dim=0) > 0.999


def test_an_adapter_of_rank_zero_changes_nothing(plain, x):
    layer = on_keys_and_values(copy.deepcopy(plain))
    layer.attach(torch.zeros(0, WIDTH))
    assert torch.equal(layer(x), plain(x))
    layer.merge()
    assert torch.equal(layer.weight, plain.weight)


@pytest.mark.parametrize(("blocks", "adaptable"), [(None, [0, 1, 2]), (1, [0]), (3, [0, 1, 2])])
def test_only_the_first_blocks_are_made_adaptable(blocks, adaptable):
    vit = stack(*(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(3)))
    inject(vit, blocks)
    assert [name for name, _ in adapted_layers(vit)] == [f"blocks.{index}.attn.qkv" for index in adaptable]


def test_all_adapters_of_a_model_merge_at_once(plain, x):
    vit = stack(adapted(plain), adapted(plain))
    unmerged = [layer(x) for _, layer in adapted_layers(vit)]
    merge_all(vit)
    assert all(layer.lora_A is None for _, layer in adapted_layers(vit))
    torch.testing.assert_close([layer(x) for _, layer in adapted_layers(vit)], unmerged)


@pytest.mark.parametrize(
    ("vit", "message"),
    [
        (nn.Linear(2, 2), "Linear cannot be adapted: it has no attention blocks"),
        (stack(), "cannot be adapted: it has no attention blocks"),
        (stack(None), "cannot be adapted: it has no attention blocks"),
        (stack(nn.Conv2d(1, 3, 1)), "blocks.0.attn.qkv is a Conv2d, no linear layer"),
        (stack(nn.Linear(WIDTH, 2 * WIDTH)), "the 16 outputs of blocks.0.attn.qkv are not q, k and v"),
        (nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(2, 2))}), "it has no attention blocks"),
    ],
)
def test_a_model_without_linear_q_k_and_v_is_refused_in_one_line(vit, message):
    with pytest.raises(ConfigError, match=message) as error:
        inject(vit)
    assert len(str(error.value).splitlines()) == 1


def test_more_blocks_than_there_are_are_refused(plain):
    with pytest.raises(ConfigError, match=r"adapter\.blocks must be at most the backbone's depth 1, got 2"):
        inject(stack(plain), 2)


# Layers of their own for q, k and v.


def separate(names: tuple[str, ...], widths: tuple[int, ...]) -> nn.Module:
    vit = stack(None)
    for name, width in zip(names, widths, strict=True):
        setattr(vit.blocks[0].attn, name, nn.Linear(WIDTH, width))
    return vit


@pytest.mark.parametrize(
    ("names", "widths", "of_k_and_v"),
    [
        (("q", "k", "v"), (8, 8, 8), {"k": [(0, 8)], "v": [(0, 8)]}),
        (("q_proj", "k_proj", "v_proj"), (8, 4, 4), {"k_proj": [(0, 4)], "v_proj": [(0, 4)]}),
        (("q", "kv"), (8, 16), {"kv": [(0, 16)]}),
        (("qk", "v"), (16, 8), {"qk": [(8, 16)], "v": [(0, 8)]}),
    ],
    ids=str,
)
def test_q_k_and_v_mean_the_same_however_many_layers_make_them(names, widths, of_k_and_v):
    vit = separate(names, widths)
    inject(vit)
    found = {name.removeprefix("blocks.0.attn."): layer.rows for name, layer in adapted_layers(vit)}
    assert {name: [(part.start, part.stop) for part in rows] for name, rows in found.items()} == of_k_and_v


# Other targets.

ROWS = {"q": slice(0, 8), "k": slice(8, 16), "v": slice(16, 24)}


def vit_block() -> nn.Module:
    made = block(nn.Linear(WIDTH, 3 * WIDTH))
    made.attn.proj = nn.Linear(WIDTH, WIDTH)
    made.mlp = nn.Module()
    made.mlp.fc1, made.mlp.fc2 = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)
    vit = nn.Module()
    vit.blocks = nn.Sequential(made)
    return vit


@pytest.mark.parametrize("targets", [("q",), ("v",), ("k", "v"), ("v", "q"), ("q", "k", "v")], ids=",".join)
def test_only_the_chosen_projections_of_qkv_change_whichever_lie_side_by_side(targets, x):
    vit = vit_block()
    inject(vit, targets=targets)
    layer = vit.blocks[0].attn.qkv
    plain, weight = layer(x), layer.weight.clone()
    layer.attach(torch.randn(RANK, WIDTH))
    nn.init.normal_(layer.lora_B)
    changed = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), changed)
    for target, rows in ROWS.items():
        assert torch.equal(changed[..., rows], plain[..., rows]) == (target not in targets)
        assert torch.equal(layer.weight[rows], weight[rows]) == (target not in targets)


@pytest.mark.parametrize(("target", "read", "written"), [("attn.proj", 8, 8), ("mlp.fc1", 8, 20), ("mlp.fc2", 20, 8)])
def test_other_layers_have_an_adapter_of_their_own_on_their_own_inputs(target, read, written):
    vit = vit_block()
    inject(vit, targets=(target,))
    ((name, layer),) = adapted_layers(vit)
    layer.attach(torch.randn(RANK, layer.in_features))
    assert name == f"blocks.0.{target}"
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((RANK, read), (written, RANK))


def test_a_target_that_the_model_does_not_have_is_refused_in_one_line(plain):
    with pytest.raises(ConfigError, match=r"blocks\.0 has no linear layer 'mlp.fc1'"):
        inject(stack(plain), targets=("mlp.fc1",))


def test_merging_hands_back_the_factors(plain):
    vit = stack(adapted(plain))
    layer = vit.blocks[0].attn.qkv
    lora_A, lora_B = layer.lora_A.detach(), layer.lora_B.detach()
    learnt = merge_all(vit)
    assert learnt.keys() == {"blocks.0.attn.qkv.lora_A", "blocks.0.attn.qkv.lora_B"}
    assert torch.equal(learnt["blocks.0.attn.qkv.lora_A"], lora_A)
    assert torch.equal(learnt["blocks.0.attn.qkv.lora_B"], lora_B)
