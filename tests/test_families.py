"""Models other than timm's VisionTransformer: learnt with, merged, resumed, served, and said on docs/backbones.md."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import inflora
from inflora.backbone import backbone_hash, build_backbone, meta_backbone, shape_of
from inflora.class_token import ClassTokenBlock, hold_weights, read_class_token_only
from inflora.config import BackboneSettings, ConfigError, RunConfig, load_config, override, parse_config
from inflora.continual import TaskResult, run
from inflora.covariance import gather_covariance
from inflora.injection import inject
from inflora.lora import LoRALinear, adapted_layers
from inflora.runs import train_into
from inflora.setup import check
from inflora.state import load_state, save_state
from tests import backbones
from tests.conftest import pair_of, same_state

PLAIN = {"img_size": 32, "patch_size": 8, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}
WINDOWS = {"img_size": 32, "in_chans": 1, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov2": ("vit_small_patch14_reg4_dinov2", PLAIN),
    "dinov3": ("vit_small_patch16_dinov3_qkvb", PLAIN),
    "eva02, one qkv": ("eva02_tiny_patch14_224", PLAIN),
    "eva02, q, k and v": ("eva02_base_patch14_224", PLAIN),
    "beit": ("beit_base_patch16_224", PLAIN),
    "siglip": ("vit_base_patch16_siglip_224", PLAIN),
    "clip": ("vit_base_patch16_clip_224", PLAIN),
    "relative positions": ("vit_relpos_small_patch16_224", PLAIN),
    "distilled": ("deit_tiny_distilled_patch16_224", PLAIN),
    "swin": ("swin_tiny_patch4_window7_224", WINDOWS),
    "swin 2": ("swinv2_tiny_window8_256", WINDOWS),
}
EVERY = pytest.mark.parametrize("family", FAMILIES)


def settings_of(family: str, **options: Any) -> BackboneSettings:
    name, small = FAMILIES[family]
    return BackboneSettings(name=name, pretrained=False, options=small | options)


TRAINED = ("dinov3", "eva02, q, k and v", "distilled", "swin")
OTHERS = [family for family, (name, _) in FAMILIES.items() if "dinov2" not in name and "_clip_" not in name]


def run_of(tiny: RunConfig, family: str, **changes: Any) -> RunConfig:
    """The tiny run in two tasks, with another backbone."""
    config = parse_config(tiny.model_dump() | {"backbone": settings_of(family).model_dump()})
    return override(config, {"data.tasks": 2, "data.validation": 0.7} | changes)


def images(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def one_line(error: pytest.ExceptionInfo) -> bool:
    return len(str(error.value).splitlines()) == 1


# The model.


@EVERY
def test_the_shape_known_beforehand_is_that_of_what_timm_pools(family):
    shape, model = shape_of(meta_backbone(settings_of(family))), build_backbone(settings_of(family)).eval()
    features = model(images())
    assert features.shape == (4, shape.width)
    torch.testing.assert_close(model.forward_head(model.forward_features(images()), pre_logits=True), features)


@EVERY
def test_covariances_are_of_what_the_adapted_layers_read(family):
    model, read = build_backbone(settings_of(family)).eval(), {}
    inject(model)

    def keep(name, args):
        read[name] = args[0].flatten(0, -2).double()

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: keep(name, args))
        for name, layer in adapted_layers(model)
    ]
    with torch.no_grad(), gather_covariance(model) as seen:
        model(images())
    assert len(hooks) == len(seen) == len(read)
    for name, covariance in seen.items():
        assert covariance.count == len(read[name])
        torch.testing.assert_close(covariance.sum_DD, read[name].T @ read[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", OTHERS)
def test_the_last_block_stays_as_it_is_in_models_of_another_class(family):
    model = build_backbone(settings_of(family)).eval()
    expected = model(images())
    read_class_token_only(model)
    assert not any(isinstance(module, ClassTokenBlock) for module in model.modules())
    assert torch.equal(model(images()), expected)


@EVERY
def test_in_bf16_held_weights_give_the_bits_of_weights_cast_in_every_forward(family):
    cast, held = build_backbone(settings_of(family)).eval(), build_backbone(settings_of(family)).eval()
    for model in (cast, held):
        inject(model)
        for number, (_, layer) in enumerate(adapted_layers(model)):
            generator = torch.Generator().manual_seed(number)
            A_RD = torch.randn(3, layer.in_features, generator=generator)
            layer.attach(A_RD, lora_B=torch.randn(sum(layer.sizes), 3, generator=generator))
    hold_weights(held, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cast(images()), held(images()))


@EVERY
def test_weights_that_timm_has_saved_are_read_from_a_file(family, tmp_path):
    saved = build_backbone(settings_of(family))
    with torch.no_grad():
        next(layer for layer in saved.modules() if isinstance(layer, nn.LayerNorm)).bias.add_(1)
    save_file(saved.state_dict() | {"head.bias": torch.zeros(7)}, tmp_path / "weights.safetensors")
    settings = settings_of(family).model_copy(update={"weights": tmp_path / "weights.safetensors"})
    assert backbone_hash(build_backbone(settings)) == backbone_hash(saved)


@pytest.mark.parametrize("family", ["dinov2", "eva02, one qkv", "beit"])
def test_positions_are_resized_to_a_larger_input(family, tmp_path):
    save_file(build_backbone(settings_of(family)).state_dict(), tmp_path / "weights.safetensors")
    settings = settings_of(family, img_size=64).model_copy(update={"weights": tmp_path / "weights.safetensors"})
    assert build_backbone(settings).eval()(torch.rand(1, 1, 64, 64)).isfinite().all()


# A run.


@pytest.fixture(scope="module", params=TRAINED)
def trained(request, tiny, tmp_path_factory) -> tuple[Path, list[TaskResult]]:
    folder, results = tmp_path_factory.mktemp("run"), []
    first_state = folder / "first"
    train_into(
        folder,
        run_of(tiny, request.param),
        "validation",
        on_task=lambda result: results.append(result) or (len(results) == 1 and save_state(result.state, first_state)),
    )
    return folder, results


def test_what_is_adapted_is_merged_and_nothing_else_changes(trained):
    folder, results = trained
    model, plain = results[-1].model, build_backbone(load_config(folder / "config.yaml").backbone).state_dict()
    changed = {name for name, tensor in model.backbone.state_dict().items() if not torch.equal(tensor, plain[name])}
    assert changed == {f"{name}.weight" for name, _ in adapted_layers(model.backbone)}
    assert all(layer.lora_A is None for _, layer in adapted_layers(model))


def test_a_run_resumes_bit_for_bit(trained):
    folder, results = trained
    *_, resumed = run(load_config(folder / "config.yaml"), load_state(folder / "first"))
    assert same_state(resumed.state, results[-1].state)


def test_every_layer_has_metrics_of_its_own(trained):
    _, results = trained
    sizes = [name for name in results[-1].metrics if name.startswith("memory/") and name.endswith("/size")]
    assert len(sizes) == len(list(adapted_layers(results[-1].model)))


def test_the_folder_is_a_model_with_the_run_s_own_logits(trained):
    folder, results = trained
    served = inflora.load(folder)
    assert not any(isinstance(module, LoRALinear) for module in served.modules())
    with torch.no_grad():
        torch.testing.assert_close(served(images()), results[-1].model(images()), rtol=1e-4, atol=1e-5)


def test_peft_adds_to_the_backbone_what_was_merged_into_it(trained):
    from peft import PeftModel

    folder, results = trained
    base = build_backbone(load_config(folder / "config.yaml").backbone).eval()
    with torch.no_grad():
        before = base(images())
        model = PeftModel.from_pretrained(base, folder / "adapters" / "task-1", adapter_name="task-1")
        model.load_adapter(folder / "adapters" / "task-2", adapter_name="task-2")
        model.base_model.set_adapter(["task-1", "task-2"])
        after = model.eval()(images())
        torch.testing.assert_close(after, results[-1].model.features(images()), rtol=1e-3, atol=1e-4)
    assert not torch.equal(before, after)


# Refused in one line.


@pytest.mark.parametrize("adapter", ["l2p", "dualprompt", "codaprompt"])
def test_prompts_are_for_vision_transformers_only(adapter, tiny):
    with pytest.raises(ConfigError, match=r"^Eva cannot be prompted: only timm's VisionTransformer can be$") as error:
        check(override(run_of(tiny, "dinov3"), pair_of(adapter)))
    assert one_line(error)


def test_a_rank_above_the_narrowest_adapted_layer_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"adapter\.rank must be at most the backbone's width 16, got 17"):
        check(run_of(tiny, "swin", **{"adapter.rank": 17}))


def test_an_unknown_option_lists_those_of_the_model_s_own_class():
    with pytest.raises(ConfigError, match=r"unknown backbone\.options 'colour'; known: .*rope_type") as error:
        meta_backbone(settings_of("dinov3", colour="blue"))
    assert one_line(error)


def test_the_jax_release_is_no_file_of_another_class(tmp_path):
    (tmp_path / "weights.npz").touch()
    settings = settings_of("dinov3").model_copy(update={"weights": tmp_path / "weights.npz"})
    with pytest.raises(ConfigError, match="the JAX release's form of a VisionTransformer, this is a Eva") as error:
        build_backbone(settings)
    assert one_line(error)


# docs/backbones.md.


@pytest.mark.parametrize("module", ["deit", "convit", "levit", "maxxvit"])
def test_the_page_says_of_a_kind_what_becomes_of_its_example(module):
    row = next(row for row in backbones.rows_of(backbones.PAGE.read_text()) if row.module == module)
    assert backbones.admission(row.example) == row.admitted


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_page_is_what_its_command_writes():
    assert backbones.page() == backbones.PAGE.read_text()
