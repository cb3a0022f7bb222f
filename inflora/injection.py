"""Making a vision transformer adaptable, and showing that it is before anything is trained.

A model may read a layer's weight without calling the layer (timm's Eva gives ``qkv.weight`` to ``F.linear``): adapters
on it would be trained without effect, and change the model only when they are merged.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from inflora.config import ConfigError, Target, cut
from inflora.lora import LoRALinear, adapted_layers

_OF_QKV: dict[Target, int] = {"q": 0, "k": 1, "v": 2}

_RANK = 2
_CLOSE, _ROUNDING = 0.05, 1e-5
"""The most by which merged features may differ from unmerged ones: shares of the adapters' effect, and of features."""
_PROVEN: set[str] = set()
"""Models of which this process knows."""


def inject(
    vit: nn.Module,
    blocks: int | None = None,
    targets: Sequence[Target] = ("k", "v"),
    layer_type: type[LoRALinear] = LoRALinear,
) -> None:
    """Make ``targets`` of the first ``blocks`` blocks (None: all) adaptable, in place.

    q, k and v read the same input and share one adapter's A; every other target has an adapter of its own.

    Raises:
        ConfigError: The model has no blocks, fewer than ``blocks``, a block lacks the linear layer of a target, or
            reads it so that an adapter has no effect.
    """
    layers = getattr(vit, "blocks", None)
    kind = type(vit).__name__
    if not isinstance(layers, nn.Sequential | nn.ModuleList) or not len(layers):
        raise ConfigError(f"{kind} cannot be adapted: it has no list of transformer blocks named 'blocks'")
    if blocks is not None and blocks > len(layers):
        raise ConfigError(f"adapter.blocks must be at most the backbone's depth {len(layers)}, got {blocks}")
    paths = dict.fromkeys("attn.qkv" if target in _OF_QKV else target for target in targets)
    for index, block in enumerate(layers[:blocks]):
        for path in paths:
            *parents, name = path.split(".")
            parent = _descend(block, parents)
            plain = getattr(parent, name, None)
            if not isinstance(plain, nn.Linear) or (name == "qkv" and plain.out_features % 3):
                what = "fused linear" if name == "qkv" else "linear"
                raise ConfigError(
                    f"{kind} cannot be adapted: blocks.{index}.{'.'.join(parents)} has no {what} '{name}'"
                )
            rows = _qkv_rows(plain.out_features // 3, targets) if name == "qkv" else (slice(None),)
            setattr(parent, name, layer_type(plain, rows))
    _prove_adaptable(vit)


def _descend(module: nn.Module, names: Sequence[str]) -> nn.Module | None:
    found: nn.Module | None = module
    for name in names:
        found = getattr(found, name, None)
    return found


def _qkv_rows(width: int, targets: Sequence[Target]) -> tuple[slice, ...]:
    """Find the chosen ones of queries, keys and values in the fused output; neighbours are one slice."""
    parts = sorted(_OF_QKV[target] for target in targets if target in _OF_QKV)
    starts = [part for part in parts if part - 1 not in parts]
    ends = [part + 1 for part in parts if part + 1 not in parts]
    return tuple(slice(start * width, end * width) for start, end in zip(starts, ends, strict=True))


def _prove_adaptable(vit: nn.Module) -> None:
    """Show on a random image that every adapter changes the features, and that merging it keeps them so.

    The model and all random generators are left as they were. Nothing is shown of a model without weights (on the meta
    device) or whose input is unknown.

    Raises:
        ConfigError: An adapter has no effect, or another one when it is merged.
    """
    layers = dict(adapted_layers(vit))
    # Whether it does is a matter of its code: once is enough for a model of the same layers.
    model = f"{type(vit)} {vit} {[(name, layer.rows) for name, layer in layers.items()]}"
    images = _image_for(vit)
    if images is None or model in _PROVEN or _is_timms_own(vit):
        return
    with _undisturbed(vit), torch.enable_grad():
        plain = _features(vit, images)
        for layer in layers.values():
            _attach_random(layer)
        adapted = _features(vit, images)
        if idle := _without_effect(layers, adapted):
            raise ConfigError(
                f"{type(vit).__name__} cannot be adapted: it reads {cut(idle[0])} past its adapter, which has no effect"
            )
        with _merged(layers):
            merged = _features(vit, images)
    change = (adapted - plain).norm()
    if not change > 0 or not (merged - adapted).norm() <= _CLOSE * change + _ROUNDING * plain.norm():
        raise ConfigError(
            f"{type(vit).__name__} cannot be adapted: merged adapters do not compute what unmerged ones do"
        )
    _PROVEN.add(model)


def _is_timms_own(vit: nn.Module) -> bool:
    """Of the classes that the tests show this for: a trial of ViT-B need not compute it again, for seconds."""
    blocks = getattr(vit, "blocks", ())
    return type(vit) is VisionTransformer and all(
        type(block) is Block and type(block.attn) is Attention and type(block.mlp) is Mlp for block in blocks
    )


def _without_effect(layers: dict[str, LoRALinear], features: Tensor) -> list[str]:
    """The layers on whose adapters the features do not depend."""
    if not features.requires_grad:
        return list(layers)
    factors = [layer.lora_B for layer in layers.values() if layer.lora_B is not None]
    seen = torch.linspace(1, 2, features.numel(), device=features.device).view_as(features) * features
    grads = torch.autograd.grad(seen.sum(), factors, allow_unused=True)
    return [name for name, grad in zip(layers, grads, strict=True) if grad is None or not grad.any()]


def _image_for(vit: nn.Module) -> Tensor | None:
    """A random image of the model's size, None where there is nothing to show it to."""
    parameter = next(vit.parameters(), None)
    patches = getattr(vit, "patch_embed", None)
    first = next((m for m in patches.modules() if isinstance(m, nn.Conv2d)), None) if patches is not None else None
    size = getattr(patches, "img_size", None)
    if first is None or size is None or parameter is None or parameter.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, first.in_channels, *size, generator=generator).to(parameter)


def _features(vit: nn.Module, images: Tensor) -> Tensor:
    try:
        features: Tensor = vit(images)
    except Exception as error:  # whatever a model makes of an image that is not for it
        raise ConfigError(f"{type(vit).__name__} cannot be adapted: it does not compute ({cut(error, 200)})") from None
    return features.float()


def _attach_random(layer: LoRALinear) -> None:
    generator = torch.Generator().manual_seed(0)
    layer.attach(torch.randn(_RANK, layer.in_features, generator=generator) * layer.in_features**-0.5)
    assert layer.lora_B is not None
    with torch.no_grad():
        layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))


@contextmanager
def _merged(layers: dict[str, LoRALinear]) -> Iterator[None]:
    """While open, what the adapters add is in the weights."""
    before = {name: layer.weight for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
            layer.merge()
        yield
    finally:
        for name, layer in layers.items():
            layer.weight = before[name]


@contextmanager
def _undisturbed(vit: nn.Module) -> Iterator[None]:
    """While open, the model is in eval mode; afterwards it has no adapters and the modes it had."""
    training = [module for module in vit.modules() if module.training]
    vit.eval()
    try:
        yield
    finally:
        for _, layer in adapted_layers(vit):
            layer.detach_adapter()
        for module in training:
            module.training = True
