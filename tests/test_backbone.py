"""timm's vision transformers: which are built and adapted, which are refused, and the covariance of what they read."""

import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from inflora.backbone import backbone_hash, build_backbone, meta_backbone, shape_of
from inflora.config import BackboneSettings, ConfigError, parse_config
from inflora.covariance import InputCovariance, gather_covariance
from inflora.injection import inject
from inflora.lora import adapted_layers
from inflora.setup import check

SMALL = {"img_size": 16, "patch_size": 8, "in_chans": 1, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 0}
VARIANTS = pytest.mark.parametrize(
    "variant",
    [
        {},
        {"class_token": False, "global_pool": "avg"},
        {"class_token": False, "global_pool": "map"},
        {"reg_tokens": 2},
        {"qk_norm": True},
        {"qkv_bias": False},
        {"init_values": 0.1, "pre_norm": True},
        {"drop_rate": 0.5, "attn_drop_rate": 0.5, "drop_path_rate": 0.5},
    ],
    ids=lambda variant: ",".join(f"{k}={v}" for k, v in variant.items()) or "plain",
)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def vit_of(variant: dict) -> VisionTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VisionTransformer(**(SMALL | variant)).eval()


def tiny_settings(**options) -> BackboneSettings:
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    return BackboneSettings(name="glyph_vit", pretrained=False, options=sizes | options)


def one_line(error: pytest.ExceptionInfo) -> bool:
    return len(str(error.value).splitlines()) == 1


@VARIANTS
def test_an_adaptable_model_computes_what_the_plain_one_does(variant, images):
    vit = vit_of(variant)
    plain = vit(images)
    inject(vit)
    assert torch.equal(vit(images), plain)
    for _, layer in adapted_layers(vit):
        layer.attach(torch.randn(2, 12))
    assert torch.equal(vit(images), plain)


@VARIANTS
def test_an_adaptable_model_has_the_plain_ones_state_dict(variant):
    vit, plain = vit_of(variant), vit_of(variant)
    inject(vit)
    assert list(vit.state_dict()) == list(plain.state_dict())
    vit.load_state_dict(plain.state_dict())


@VARIANTS
def test_adapters_that_have_learnt_something_change_the_features(variant, images):
    vit = vit_of(variant)
    inject(vit)
    plain = vit(images)
    for _, layer in adapted_layers(vit):
        layer.attach(torch.randn(2, 12))
        torch.nn.init.normal_(layer.lora_B)
    assert not torch.allclose(vit(images), plain)


# The covariance of the inputs.


def what_qkv_reads(vit: VisionTransformer, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """All inputs (N x D, float64) of each block's qkv, seen from outside: the output of the norm before it."""
    seen = [[] for _ in vit.blocks]
    hooks = [
        block.norm1.register_forward_hook(lambda _, __, out, to=to: to.append(out.detach().flatten(0, 1).double()))
        for block, to in zip(vit.blocks, seen, strict=True)
    ]
    for batch in batches:
        vit(batch)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in seen]


def gathered(vit: VisionTransformer, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    with gather_covariance(vit) as seen:
        for batch in batches:
            vit(batch)
    return [covariance.sum_DD / covariance.count for covariance in seen.values()]


@VARIANTS
def test_the_gathered_covariance_is_the_dense_one(variant, images):
    vit = vit_of(variant)
    inject(vit)
    dense = [inputs_ND.T @ inputs_ND / len(inputs_ND) for inputs_ND in what_qkv_reads(vit, [images])]
    torch.testing.assert_close(gathered(vit, [images]), dense, rtol=1e-5, atol=1e-6)


def test_a_covariance_made_in_strips_is_the_dense_one_and_symmetric_to_the_bit():
    inputs_BND = torch.randn(2, 30, 600, generator=torch.Generator().manual_seed(0))
    covariance = InputCovariance(600, torch.device("cpu"))
    covariance.add(inputs_BND[:1])
    covariance.add(inputs_BND[1:])
    covariance.mirror()
    flat = inputs_BND.flatten(0, 1).double()
    torch.testing.assert_close(covariance.sum_DD, flat.T @ flat, rtol=1e-5, atol=1e-4)
    assert torch.equal(covariance.sum_DD, covariance.sum_DD.T)


def test_the_covariance_counts_every_token_the_same_whatever_the_batches(images):
    vit = vit_of({})
    inject(vit)
    uneven = [images[:1], images[1:4], images[4:]]
    torch.testing.assert_close(gathered(vit, uneven), gathered(vit, [images]), rtol=1e-5, atol=1e-6)


def hooks_on(vit: VisionTransformer) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in vit.modules())


def test_the_hooks_are_there_while_gathering_and_gone_afterwards():
    vit = vit_of({})
    inject(vit)
    with gather_covariance(vit):
        assert hooks_on(vit) == 2
    assert hooks_on(vit) == 0


def test_the_hooks_are_gone_after_an_exception():
    vit = vit_of({})
    inject(vit)
    with pytest.raises(RuntimeError, match="interrupted"), gather_covariance(vit):
        raise RuntimeError("interrupted")
    assert hooks_on(vit) == 0


# Building and refusing.


def test_random_weights_are_the_same_at_every_call_and_leave_the_callers_randomness_alone():
    torch.manual_seed(1)
    first = backbone_hash(build_backbone(tiny_settings()))
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)
    assert backbone_hash(build_backbone(tiny_settings())) == first


def test_the_hash_tells_weights_apart():
    vit = build_backbone(tiny_settings())
    before = backbone_hash(vit)
    with torch.no_grad():
        vit.norm.bias[0] += 1e-6
    assert backbone_hash(vit) != before


@pytest.mark.parametrize(
    "settings",
    [
        tiny_settings(),
        tiny_settings(in_chans=3, img_size=64),
        BackboneSettings(name="vit_tiny_patch16_224", pretrained=False, options={"depth": 1, "img_size": 32}),
        BackboneSettings(name="vit_tiny_r_s16_p8_224", pretrained=False, options={"depth": 1, "img_size": 32}),
    ],
    ids=lambda settings: f"{settings.name}-{settings.options.get('img_size')}",
)
def test_the_shape_known_beforehand_is_the_shape_that_is_built(settings):
    shape, vit = shape_of(meta_backbone(settings)), build_backbone(settings).eval()
    image = torch.rand(1, shape.channels, shape.image_size, shape.image_size)
    assert vit(image).shape == (1, shape.width)
    assert len(vit.blocks) == shape.depth


def test_weights_are_read_from_a_file(tmp_path):
    vit = build_backbone(tiny_settings())
    with torch.no_grad():
        vit.norm.bias += 1
    save_file(vit.state_dict(), tmp_path / "weights.safetensors")
    settings = tiny_settings().model_copy(update={"weights": tmp_path / "weights.safetensors"})
    assert backbone_hash(build_backbone(settings)) == backbone_hash(vit)


@pytest.mark.parametrize("kind", ["missing", "a folder", "not safetensors", "another model"])
def test_weights_that_cannot_be_read_or_do_not_fit_are_refused_in_one_line(kind, tmp_path):
    path = tmp_path / "weights.safetensors"
    if kind == "a folder":
        path.mkdir()
    if kind == "not safetensors":
        path.write_bytes(b"\x80\x04 pickled?")
    if kind == "another model":
        save_file(build_backbone(tiny_settings(depth=1)).state_dict(), path)
    with pytest.raises(ConfigError, match=r"backbone\.weights") as error:
        build_backbone(tiny_settings().model_copy(update={"weights": path}))
    assert one_line(error)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "'resnet18' is a ResNet, which cannot be adapted: it has no attention blocks"),
        ("levit_128", r"is a LevitDistilled, which cannot be adapted: stages\.0\.blocks\.0\.attn\.qkv is a LinearNorm"),
        (
            "qwen3_vit_88m_enc",
            r"'qwen3_vit_88m_enc' cannot be used: it gives features of shape \(1, .*, not pooled ones",
        ),
        ("vit_tiny_patch99_224", "unknown backbone.name 'vit_tiny_patch99_224'; known: glyph_vit and timm's"),
        ("", "unknown backbone.name ''; known: glyph_vit and timm's"),
    ],
)
def test_a_name_that_is_no_vision_transformer_is_refused_in_one_line(name, message):
    with pytest.raises(ConfigError, match=message) as error:
        shape_of(meta_backbone(BackboneSettings(name=name, pretrained=False)))
    assert one_line(error)


def test_two_attentions_side_by_side_in_a_block_are_both_adapted():
    settings = BackboneSettings(name="vit_small_patch16_18x2_224", pretrained=False, options={"depth": 1})
    inject(vit := build_backbone(settings))
    assert [name for name, _ in adapted_layers(vit)] == [f"blocks.0.attns.{index}.attn.qkv" for index in (0, 1)]


@pytest.mark.parametrize(
    "options",
    [
        {"colour": "blue"},
        {"num_classes": 10},
        {"depth": "two"},
        {"depth": 0},
        {"embed_dim": -1},
        {"num_heads": 3},
        {"num_heads": 0},
        {"class_token": False},
        {"global_pool": ""},
        {"img_size": [32, 64]},
        {"norm_layer": "nix"},
        {"act_layer": "nix"},
        {"in_chans": 0},
        {"depth": 10**9},
        {"img_size": 16384, "patch_size": 1},
        {"norm_layer": "batchnorm2d"},
        {"drop_path_rate": 5},
        {"checkpoint_path": "x"},
    ],
    ids=str,
)
def test_options_that_make_no_usable_model_are_refused_in_one_line_before_anything_heavy(options, tiny):
    backbone = tiny.backbone.model_dump() | {"options": tiny.backbone.options | options}
    with pytest.raises(ConfigError, match=r"backbone\.options") as error:
        check(parse_config(tiny.model_dump() | {"backbone": backbone}))
    assert one_line(error)


# Weights from local files.


def jax_release(vit: VisionTransformer) -> dict[str, np.ndarray]:
    """A model's tensors under the names and in the layouts of the original JAX release."""
    width, heads = vit.embed_dim, vit.blocks[0].attn.num_heads
    t = {name: tensor.detach().numpy() for name, tensor in vit.state_dict().items()}
    out = {
        "cls": t["cls_token"],
        "embedding/kernel": t["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": t["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": t["pos_embed"],
        "Transformer/encoder_norm/scale": t["norm.weight"],
        "Transformer/encoder_norm/bias": t["norm.bias"],
    }
    for index in range(len(vit.blocks)):
        block, to = f"blocks.{index}", f"Transformer/encoderblock_{index}"
        for norm, name in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            out[f"{to}/{name}/scale"], out[f"{to}/{name}/bias"] = t[f"{block}.{norm}.weight"], t[f"{block}.{norm}.bias"]
        attention = f"{to}/MultiHeadDotProductAttention_1"
        weights, biases = t[f"{block}.attn.qkv.weight"].reshape(3, width, width), t[f"{block}.attn.qkv.bias"]
        for weight, bias, name in zip(weights, biases.reshape(3, width), ("query", "key", "value"), strict=True):
            out[f"{attention}/{name}/kernel"] = weight.T.reshape(width, heads, -1)
            out[f"{attention}/{name}/bias"] = bias.reshape(heads, -1)
        out[f"{attention}/out/kernel"] = t[f"{block}.attn.proj.weight"].T.reshape(heads, -1, width)
        out[f"{attention}/out/bias"] = t[f"{block}.attn.proj.bias"]
        for layer, name in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            out[f"{to}/MlpBlock_3/{name}/kernel"] = t[f"{block}.mlp.{layer}.weight"].T
            out[f"{to}/MlpBlock_3/{name}/bias"] = t[f"{block}.mlp.{layer}.bias"]
    return out


def teacher(vit: VisionTransformer) -> dict[str, dict[str, torch.Tensor]]:
    """A checkpoint of self-supervised training, as DINO and iBOT release theirs."""
    wrapped = {f"module.backbone.{name}": tensor for name, tensor in vit.state_dict().items()}
    return {"student": {}, "teacher": wrapped | {"module.head.mlp.0.weight": torch.zeros(2, 2)}}


WRITERS = {
    "plain.safetensors": lambda vit, path: save_file(vit.state_dict(), path),
    "classifier.safetensors": lambda vit, path: save_file(vit.state_dict() | {"head.weight": torch.zeros(9, 12)}, path),
    "jax.npz": lambda vit, path: np.savez(path, **jax_release(vit)),
    "plain.pth": lambda vit, path: torch.save(vit.state_dict(), path),
    "teacher.pth": lambda vit, path: torch.save(teacher(vit), path),
}


def settings_for(path, **options) -> BackboneSettings:
    options = {key: value for key, value in SMALL.items() if key != "num_classes"} | options
    return BackboneSettings(name="glyph_vit", weights=path, options=options)


@pytest.mark.parametrize("name", WRITERS)
def test_weights_come_from_every_kind_of_file(name, tmp_path):
    vit = vit_of({})
    torch.nn.init.normal_(vit.cls_token)
    WRITERS[name](vit, tmp_path / name)
    assert backbone_hash(build_backbone(settings_for(tmp_path / name))) == backbone_hash(vit)


@pytest.mark.parametrize("name", ["plain.safetensors", "jax.npz"])
def test_position_embeddings_are_resized_to_a_larger_input(name, tmp_path):
    vit = vit_of({})
    WRITERS[name](vit, tmp_path / name)
    larger = build_backbone(settings_for(tmp_path / name, img_size=32))
    assert larger.pos_embed.shape[1] == 1 + 16
    torch.testing.assert_close(larger.pos_embed[:, :1], vit.pos_embed[:, :1])
    assert torch.equal(larger.blocks[0].attn.qkv.weight, vit.blocks[0].attn.qkv.weight)


class Malicious:
    def __reduce__(self):
        return print, ("this code ran",)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"model": Malicious()}, tmp_path / "bad.pth")
    with pytest.raises(ConfigError, match=r"bad\.pth") as error:
        build_backbone(settings_for(tmp_path / "bad.pth"))
    assert one_line(error)
    assert "this code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.safetensors", None, "does not exist"),
        ("weights.bin", b"", "must be one of .safetensors, .npz, .pth"),
        ("cut.safetensors", b"\x08", "cannot load"),
        ("cut.npz", b"PK", "cannot load"),
        ("cut.pth", b"PK", "cannot load"),
    ],
)
def test_weights_that_cannot_be_read_are_one_line_that_names_the_file(name, content, says, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=says) as error:
        build_backbone(settings_for(tmp_path / name))
    assert one_line(error) and name in str(error.value)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_weights_that_was_cut_off_is_one_line(name, tmp_path):
    WRITERS[name](vit_of({}), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match="cannot load") as error:
        build_backbone(settings_for(tmp_path / name))
    assert one_line(error)


def test_weights_of_another_model_are_refused(tmp_path):
    save_file(vit_of({"embed_dim": 24}).state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(ConfigError, match=r"wide\.safetensors") as error:
        build_backbone(settings_for(tmp_path / "wide.safetensors"))
    assert one_line(error)


@pytest.mark.parametrize(
    "options",
    [
        {"qkv_bias": False},
        {"depth": 3},
        {"in_chans": 3},
        {"init_values": 0.1},
        {"pos_embed": "none"},
        {"patch_size": 4},
    ],
    ids=str,
)
def test_options_leave_the_named_weights_as_they_are(options):
    with pytest.raises(ConfigError, match=r"must leave the weights' names and shapes as they are, and change") as error:
        meta_backbone(BackboneSettings(options=options))
    assert one_line(error)
    shape_of(meta_backbone(BackboneSettings(options={"img_size": 64, "act_layer": "relu"})))


@pytest.mark.parametrize("name", ["plain.safetensors", "jax.npz", "plain.pth"])
def test_weights_that_are_no_numbers_are_refused_when_they_are_read(name, tmp_path):
    vit = vit_of({})
    torch.nn.init.constant_(vit.blocks[1].norm2.bias, torch.nan)
    WRITERS[name](vit, tmp_path / name)
    with pytest.raises(ConfigError, match=r"blocks\.1\.norm2\.bias is not given, or holds numbers that are not finite"):
        build_backbone(settings_for(tmp_path / name))


@pytest.mark.parametrize("name", ["plain.safetensors", "jax.npz", "plain.pth"])
def test_weights_of_another_depth_or_patch_size_are_refused(name, tmp_path):
    WRITERS[name](vit_of({"depth": 3}), tmp_path / name)
    with pytest.raises(ConfigError, match="cannot load"):
        build_backbone(settings_for(tmp_path / name))
    WRITERS[name](vit_of({"patch_size": 4}), tmp_path / name)
    with pytest.raises(ConfigError, match="cannot load"):
        build_backbone(settings_for(tmp_path / name))


def test_weights_from_a_pipe_are_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ConfigError, match="it is a "):
        build_backbone(settings_for(tmp_path / "pipe.safetensors"))


def test_a_refused_pickle_comes_without_advice_to_run_it(tmp_path):
    torch.save({"model": Malicious()}, tmp_path / "bad.pth")
    with pytest.raises(ConfigError, match="other things than tensors") as error:
        build_backbone(settings_for(tmp_path / "bad.pth"))
    assert "weights_only" not in str(error.value)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    asked = []

    def away(url, **options):
        asked.append(options["timeout"])
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr("inflora.pretrained.get_hf_file_metadata", away)
    monkeypatch.setattr("inflora.backbone.from_cache", lambda name: None)
    with pytest.raises(ConfigError, match=r"cannot be had .*no route to host.*backbone\.weights=PATH") as error:
        build_backbone(BackboneSettings(name="vit_tiny_patch16_224"))
    assert one_line(error)
    assert asked == [5.0]
