"""Vision models from timm with attention: build, load weights, measure, identify."""

import hashlib
import os
import warnings
from collections.abc import Mapping
from importlib.resources import as_file, files
from inspect import signature
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from inflora.attention import attention_blocks, input_shape, why_no_attention
from inflora.config import BackboneSettings, ConfigError, cut, shown
from inflora.pretrained import (
    from_cache,
    is_resized,
    load_weights,
    reason_of,
    require_finite,
    require_hub,
    unavailable,
)

GLYPH_VIT: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "in_chans": 1,
    "embed_dim": 128,
    "depth": 5,
    "num_heads": 4,
}
"""The shipped backbone, pre-trained on rendered letters by ``python docs/glyphs.py``."""


class BackboneShape(NamedTuple):
    """The sizes that other settings must agree with."""

    width: int
    depth: int
    channels: int
    image_size: int


def build_backbone(settings: BackboneSettings) -> nn.Module:
    """The model with its weights, without a classifier: from images to pooled features (B x D).

    Raises:
        ConfigError: An unknown name, a model without attention blocks or pooled features, or weights that are missing
            or do not fit.
    """
    meta_backbone(settings)  # what does not fit is said before anything is computed or fetched
    if settings.weights is not None:
        return load_weights(_random(settings), settings.weights)
    if not settings.pretrained:
        return _random(settings)
    if settings.name == "glyph_vit":
        with as_file(files("inflora") / "weights" / "glyph_vit.safetensors") as path:
            return load_weights(_random(settings), path)
    return _from_hub(settings)


def meta_backbone(settings: BackboneSettings) -> nn.Module:
    """The model without weights or memory for them, to check settings against.

    Raises:
        ConfigError: As ``build_backbone``, but for the weights.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers without numbers: those are refused
        _require_known_options(settings)
        model = _create(settings)
        numbers = sum(tensor.numel() for tensor in model.state_dict().values())
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if 4 * numbers > memory:
            raise ConfigError(
                f"the weights of {cut(repr(settings.name))} with backbone.options {shown(settings.options)} need "
                f"{4 * numbers:.3g} bytes, this machine has {memory:.3g}"
            )
        if settings.options or not isinstance(model, VisionTransformer):
            _require_usable(model, settings)
    return model


def _options_of(kind: type[nn.Module]) -> list[str]:
    """The keyword arguments of a class of models that a user may give: also its bases', where it passes them on."""
    named: set[str] = set()
    for each in kind.__mro__[: -len(nn.Module.__mro__)]:
        given = signature(each).parameters.values()
        named |= {one.name for one in given if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
        if not any(one.kind is one.VAR_KEYWORD for one in given):
            break
    return sorted(named - {"num_classes", "device", "dtype", "cfg"})


_LARGEST = {"depth": 200, "depths": 200}
"""More than any model's; of rates, 1 is, and of all other numbers, 16,384."""


def _require_known_options(settings: BackboneSettings) -> None:
    if not settings.options:
        return
    plain = settings.model_copy(update={"options": {}})
    known = _options_of(VisionTransformer if settings.name == "glyph_vit" else type(_create(plain)))
    for name, value in settings.options.items():
        if name not in known:
            raise ConfigError(f"unknown backbone.options {cut(repr(name))}; known: {', '.join(known)}")
        largest = 1 if name.endswith("_rate") else _LARGEST.get(name, 16_384)
        numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int | float)]
        if any(not 0 <= number <= largest for number in numbers):
            raise ConfigError(f"backbone.options {name} must be from 0 to {largest}, got {shown(value)}")


def _require_usable(model: nn.Module, settings: BackboneSettings) -> None:
    """Raise ConfigError unless the model computes, and is one that the named weights fit; nothing is computed."""
    shape = shape_of(model)
    try:
        features = model.eval()(torch.empty(1, shape.channels, shape.image_size, shape.image_size))
    except Exception as error:  # whatever layers make of options that they do not take
        raise _unfit(settings, reason_of(error)) from None
    if not isinstance(features, Tensor) or features.shape != (1, shape.width):
        given = (
            f"of shape {tuple(features.shape)}" if isinstance(features, Tensor) else f"as a {type(features).__name__}"
        )
        raise _unfit(settings, f"it gives features {given}, not pooled ones of width {shape.width}")
    if settings.options and settings.pretrained and settings.weights is None:
        plain = _tensors_of(_create(settings.model_copy(update={"options": {}})))
        changed = sorted(plain ^ _tensors_of(model))
        if changed:
            names = ", ".join(dict.fromkeys(name for name, _ in changed))
            raise _unfit(settings, f"they must leave the weights' names and shapes as they are, and change {names}")


def _tensors_of(model: nn.Module) -> set[tuple[str, torch.Size]]:
    """Names and shapes; the shape of what is resized to the input does not count."""
    return {(name, torch.Size() if is_resized(name) else tensor.shape) for name, tensor in model.state_dict().items()}


def _unfit(settings: BackboneSettings, reason: str) -> ConfigError:
    name, reason = cut(repr(settings.name)), cut(reason, 250)
    if not settings.options:
        return ConfigError(f"backbone.name {name} cannot be used: {reason}")
    return ConfigError(f"backbone.options {shown(settings.options)} do not fit {name}: {reason}")


def shape_of(model: nn.Module) -> BackboneShape:
    """The measures of a model.

    Raises:
        ConfigError: It has no blocks, gives no pooled features, or its input is not square.
    """
    (channels, height, width), depth = input_shape(model) or (0, 0, 0), len(attention_blocks(model))
    pool = getattr(model, "global_pool", "") if isinstance(model, VisionTransformer) else "its own"
    if height != width or not height or not depth or not pool:
        raise ConfigError(
            "backbone.options must leave a square input, at least one block and pooled features, got "
            f"{height} x {width}, {depth} blocks, global_pool {pool!r}"
        )
    return BackboneShape(_feature_width(model), depth, channels, height)


def _feature_width(model: nn.Module) -> int:
    width = getattr(model, "embed_dim" if isinstance(model, VisionTransformer) else "head_hidden_size", None)
    return cast(int, model.num_features if width is None else width)


def backbone_hash(vit: nn.Module) -> str:
    """Identity of the weights: a hash over all tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vit.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _random(settings: BackboneSettings) -> nn.Module:
    """The same random weights at every call, whatever the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _create(settings)


def _create(settings: BackboneSettings) -> nn.Module:
    """The model without the weights that its name means."""
    name, options = settings.name, cast(dict[str, Any], settings.options)
    if name != "glyph_vit" and not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0][:12]}*") or timm.list_models("vit_base*")
        raise ConfigError(
            f"unknown backbone.name {cut(repr(name))}; known: glyph_vit and timm's, e.g. {', '.join(close[:5])}"
        )
    try:
        if name == "glyph_vit":
            return VisionTransformer(num_classes=0, **(GLYPH_VIT | options))
        model = timm.create_model(name, pretrained=False, num_classes=0, **options)
    except Exception as error:  # whatever timm makes of options that it does not take
        raise _unfit(settings, reason_of(error)) from None
    return _adaptable(model, settings)


def _from_hub(settings: BackboneSettings) -> nn.Module:
    """The model with the weights that its name means."""
    name, options = settings.name, cast(dict[str, Any], settings.options)
    overlay = from_cache(name)
    if overlay is None:
        require_hub(name)
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **options)
        require_finite(model)
    except Exception as error:  # of the network, the hub, the files that it gave
        if cached := overlay or from_cache(name):
            raise ConfigError(
                f"cannot read the cached {cached['file']} ({reason_of(error)}); delete it, or download it again"
            ) from None
        raise unavailable(name, error) from None
    return _adaptable(model, settings)


def _adaptable(model: nn.Module, settings: BackboneSettings) -> nn.Module:
    """timm's model as it can be adapted: it calls the layers that it has, and says what images it reads."""
    if not attention_blocks(model):
        kind = type(model).__name__
        raise ConfigError(
            f"backbone.name {settings.name!r} is a {kind}, which cannot be adapted: {why_no_attention(model)}"
        )
    for module in model.modules():
        # BEiT's, EVA's and Swin v2's attention gives the weight of ``qkv`` to a function, unless it adds biases later.
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True  # type: ignore[assignment]
    _record_input(model, settings.options)
    return model


def _record_input(model: Any, options: Mapping[str, Any]) -> None:
    """Keep the size of the input among what timm keeps of the model's weights, as some models say it nowhere else."""
    if size := model.pretrained_cfg.get("input_size"):
        sides = options.get("img_size") or size[1:]
        sides = (sides, sides) if isinstance(sides, int) else sides
        model.pretrained_cfg = model.pretrained_cfg | {"input_size": (options.get("in_chans", size[0]), *sides)}
