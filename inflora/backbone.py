"""Vision transformers from timm: build, load weights, identify, and watch what their ``qkv`` layers read."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from inflora.config import BackboneSettings, ConfigError
from inflora.lora import adapted_layers
from inflora.precision import products

GLYPH_VIT: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "in_chans": 1,
    "embed_dim": 128,
    "depth": 5,
    "num_heads": 4,
}
"""The shipped backbone, pre-trained on rendered letters by ``python -m inflora.glyphs``."""


WEIGHT_SUFFIXES = (".safetensors", ".npz", ".pth", ".pt")


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
        overlay = _from_cache(name) if pretrained else None
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, pretrained_cfg_overlay=overlay, **options)
    except ConfigError:
        raise
    except (TypeError, ValueError, AssertionError, ArithmeticError, OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if not pretrained:
            raise ConfigError(f"backbone.options {options} do not fit {name!r}: {reason}") from None
        if overlay := _from_cache(name):
            raise ConfigError(
                f"cannot read the cached {overlay['file']} ({reason}); delete it, or download it again"
            ) from None
        raise ConfigError(
            f"cannot load the weights of backbone.name {name!r}: they are not in the hub's cache and cannot be had "
            f"from here ({reason}); {_where_to_get(name)}"
        ) from error
    if not isinstance(model, VisionTransformer):
        raise ConfigError(f"backbone.name {name!r} is a {type(model).__name__}; only a VisionTransformer is adapted")
    return model


def _from_cache(name: str) -> dict[str, str] | None:
    """What tells timm to read the hub's cached file, without asking the hub whether there is a newer one."""
    source = timm.get_pretrained_cfg(name)
    path = source and source.hf_hub_id and try_to_load_from_cache(source.hf_hub_id, "model.safetensors")
    return {"file": path} if isinstance(path, str) else None


def _where_to_get(name: str) -> str:
    """What to download and where to put it."""
    source = timm.get_pretrained_cfg(name)
    hub_id = source.hf_hub_id if source else None
    ways = "load the model once where there is a network and take its cache along ($HF_HOME)"
    if hub_id:
        ways = f"download model.safetensors of {hub_id} where there is a network"
    return f"{ways} and set backbone.weights=PATH ({', '.join(WEIGHT_SUFFIXES)})"


def _loaded(vit: VisionTransformer, path: Path) -> VisionTransformer:
    """Load a local file; position embeddings are resized where the input's size differs, classifiers are left out."""
    if path.suffix not in WEIGHT_SUFFIXES:
        raise ConfigError(f"backbone.weights must be one of {', '.join(WEIGHT_SUFFIXES)}, got {path.name}")
    if not path.is_file():
        raise ConfigError(f"backbone.weights {path} does not exist")
    try:
        if path.suffix == ".npz":  # the original JAX release
            vit.load_pretrained(str(path))
            return vit
        tensors = _backbone_tensors(load_file(path) if path.suffix == ".safetensors" else _load_pickled(path))
        fitted = checkpoint_filter_fn({name: tensor.float() for name, tensor in tensors.items()}, vit)
        foreign = [name for name in fitted if name.split(".")[0] in ("head", "head_dist")]
        vit.load_state_dict({name: tensor for name, tensor in fitted.items() if name not in foreign})
    except Exception as error:  # damaged files of four formats raise many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(f"cannot load backbone.weights {path}: {reason}") from None
    return vit


def _load_pickled(path: Path) -> dict[str, Any]:
    """A PyTorch checkpoint; tensors and plain values only, nothing that could run code."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict):
        raise TypeError(f"it holds a {type(checkpoint).__name__}, expected a dictionary of tensors")
    return checkpoint


def _backbone_tensors(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The backbone's tensors in a checkpoint of a training run: the (teacher's) model, without what wraps it.

    Self-supervised releases (DINO, iBOT) keep the weights under "teacher" or "state_dict", with "module.backbone."
    before every name and a projection head beside them.
    """
    for key in ("teacher", "state_dict", "model"):
        if isinstance(checkpoint.get(key), dict):
            return _backbone_tensors(checkpoint[key])
    tensors = {name.removeprefix("module."): value for name, value in checkpoint.items() if torch.is_tensor(value)}
    if any(name.startswith("backbone.") for name in tensors):
        tensors = {name[9:]: value for name, value in tensors.items() if name.startswith("backbone.")}
    if "masked_embed" in tensors:  # iBOT's mask token, used in its pre-training only
        del tensors["masked_embed"]
    return tensors


class InputCovariance:
    """Running sum of ``h h^T`` over a layer's inputs ``h`` (float64 sums of float32 products), and their number.

    The products are made for the upper triangle only, in strips; ``mirror`` completes the sum.
    """

    STRIP = 256  # narrower ones multiply more slowly than they save

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum_DD = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, inputs_BND: Tensor) -> None:
        flat = inputs_BND.detach().flatten(0, -2).float()
        # Layers are watched while the model computes, in whatever precision that is.
        with products("fp32", flat.device):
            for start in range(0, flat.shape[1], self.STRIP):
                end = start + self.STRIP
                self.sum_DD[start:end, start:] += flat[:, start:end].T @ flat[:, start:]
        self.count += len(flat)

    def mirror(self) -> None:
        """Complete the sum when all inputs have been added."""
        self.sum_DD = self.sum_DD.triu() + self.sum_DD.triu(1).T


@contextmanager
def gather_covariance(model: nn.Module) -> Iterator[dict[str, InputCovariance]]:
    """Watch every adaptable layer while the context is open: layer name -> covariance of what it has read.

    The sums are complete when the context is left. A compiled model runs as it is written meanwhile.
    """
    seen: dict[str, InputCovariance] = {}
    hooks = []
    for name, layer in adapted_layers(model):
        seen[name] = InputCovariance(layer.in_features, layer.weight.device)
        hooks.append(layer.register_forward_pre_hook(lambda _, args, to=seen[name]: to.add(args[0])))
    try:
        with torch.compiler.set_stance("force_eager"):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()
        for covariance in seen.values():
            covariance.mirror()
