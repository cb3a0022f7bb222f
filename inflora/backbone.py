"""Vision transformers from timm: build, load weights, identify, and watch what their ``qkv`` layers read."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from inflora.config import BackboneSettings, ConfigError
from inflora.lora import adapted_layers

GLYPH_VIT: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "in_chans": 1,
    "embed_dim": 128,
    "depth": 5,
    "num_heads": 4,
}
"""The shipped backbone, pre-trained on rendered letters by ``python -m inflora.glyphs``."""


class BackboneShape(NamedTuple):
    """What other settings must agree with."""

    width: int
    depth: int
    channels: int
    image_size: int


def build_backbone(settings: BackboneSettings) -> VisionTransformer:
    """The vision transformer with its weights, without a classifier.

    Raises:
        ConfigError: An unknown name, a model of another kind, or weights that are missing or do not fit.
    """
    if settings.weights is not None:
        return _loaded(_random(settings), settings.weights)
    if not settings.pretrained:
        return _random(settings)
    if settings.name == "glyph_vit":
        with as_file(files("inflora") / "weights" / "glyph_vit.safetensors") as path:
            return _loaded(_random(settings), path)
    return _create(settings, pretrained=True)


def meta_backbone(settings: BackboneSettings) -> VisionTransformer:
    """The model without weights or memory for them, to check settings against.

    Raises:
        ConfigError: As ``build_backbone``, but for the weights.
    """
    with torch.device("meta"):
        return _create(settings, pretrained=False)


def shape_of(vit: VisionTransformer) -> BackboneShape:
    """The measures of a vision transformer.

    Raises:
        ConfigError: It has no blocks, gives no pooled features, or its input is not square.
    """
    height, width = vit.patch_embed.img_size
    if height != width or not len(vit.blocks) or not vit.global_pool:
        raise ConfigError(
            "backbone.options must leave a square input, at least one block and pooled features, got "
            f"{height} x {width}, {len(vit.blocks)} blocks, global_pool {vit.global_pool!r}"
        )
    first = next(module for module in vit.patch_embed.modules() if isinstance(module, nn.Conv2d))
    return BackboneShape(vit.embed_dim, len(vit.blocks), first.in_channels, height)


def backbone_hash(vit: nn.Module) -> str:
    """Identity of the weights: a hash over all tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vit.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _random(settings: BackboneSettings) -> VisionTransformer:
    """The same random weights at every call, whatever the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _create(settings, pretrained=False)


def _create(settings: BackboneSettings, *, pretrained: bool) -> VisionTransformer:
    name, options = settings.name, cast(dict[str, Any], settings.options)
    try:
        if name == "glyph_vit":
            return VisionTransformer(num_classes=0, **(GLYPH_VIT | options))
        if not timm.is_model(name):
            close = timm.list_models(f"*{name.split('.')[0][:12]}*") or timm.list_models("vit_base*")
            raise ConfigError(
                f"unknown backbone.name {name!r}; known: glyph_vit and timm's, e.g. {', '.join(close[:5])}"
            )
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except (TypeError, ValueError, AssertionError, ArithmeticError, OSError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if not pretrained:
            raise ConfigError(f"backbone.options {options} do not fit {name!r}: {reason}") from None
        raise ConfigError(
            f"cannot load the weights of backbone.name {name!r} ({reason}); "
            "download them once with network access, or set backbone.weights to a local .safetensors file"
        ) from error
    if not isinstance(model, VisionTransformer):
        raise ConfigError(f"backbone.name {name!r} is a {type(model).__name__}; only a VisionTransformer is adapted")
    return model


def _loaded(vit: VisionTransformer, path: Path) -> VisionTransformer:
    try:
        weights = load_file(path)
        vit.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"cannot load backbone.weights {path}: {reason}") from None
    return vit


class InputCovariance:
    """Running sum of ``h h^T`` over a layer's inputs ``h`` (float64 sums of float32 products), and their number."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum_DD = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, inputs_BND: Tensor) -> None:
        flat = inputs_BND.detach().flatten(0, -2).float()
        self.sum_DD += flat.T @ flat
        self.count += len(flat)


@contextmanager
def gather_covariance(model: nn.Module) -> Iterator[dict[str, InputCovariance]]:
    """Watch every adaptable layer while the context is open: layer name -> covariance of what it has read."""
    seen: dict[str, InputCovariance] = {}
    hooks = []
    for name, layer in adapted_layers(model):
        seen[name] = InputCovariance(layer.in_features, layer.weight.device)
        hooks.append(layer.register_forward_pre_hook(lambda _, args, to=seen[name]: to.add(args[0])))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
