"""Showing that a model is adaptable before anything is trained: by what it does, whatever its class.

On one random image, every adapter is seen to change the features and to receive a gradient, every adaptable layer to be
called (so that hooks see what it reads, for covariances), a merged adapter to compute what the unmerged one does, and
q, k and v to be the parts of a fused layer that they are taken for. A model may fail each: it may give a layer's weight
to a function without calling the layer (timm's EVA-02 B does), or lay q, k and v out head by head.

Weights are not needed: on the meta device all is shown that the graph of the computation says.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from inflora.attention import attention_blocks, input_shape
from inflora.config import ConfigError, cut
from inflora.lora import LoRALinear, adapted_layers

_RANK = 2
_CLOSE, _ROUNDING = 0.05, 1e-5
"""The most by which merged features may differ from unmerged ones: shares of the adapters' effect, and of features."""
_SHUT = 1e-3
"""The most that scales are of which the features would show too little."""
_PROVEN: set[str] = set()
"""Models of which this process knows."""


def prove_adaptable(model: nn.Module) -> None:
    """Show that every adaptable layer of the model acts as it must.

    The model and all random generators are left as they were. Nothing is shown of a model whose input is unknown.

    Raises:
        ConfigError: It does not: which layer, and why.
    """
    layers, images = dict(adapted_layers(model)), _image_for(model)
    if images is None or _is_timms_own(model):
        return
    # Whether it does is a matter of its code: once is enough for a model of the same layers.
    known = f"{images.device} {type(model)} {model} {[(name, layer.rows) for name, layer in layers.items()]}"
    if known in _PROVEN:
        return
    with _undisturbed(model), _open_gates(model), torch.enable_grad(), images.device:
        if reason := _misbehaviour(model, layers, images):
            raise ConfigError(f"{type(model).__name__} cannot be adapted: {reason}")
    _PROVEN.add(known)


def _misbehaviour(model: nn.Module, layers: dict[str, LoRALinear], images: Tensor) -> str:
    """The first thing that the model does otherwise than it must; empty where there is none."""
    plain = _features(model, images)
    for layer in layers.values():
        _attach_random(layer)
    with _watched(layers) as called:
        adapted = _features(model, images)
    if unseen := [name for name in layers if name not in called]:
        return f"it reads the weight of {cut(unseen[0])} without calling the layer: adapters and hooks see nothing"
    if idle := _without_effect(layers, adapted):
        return f"an adapter on {cut(idle[0])} has no effect on the features"
    if images.is_meta:
        return ""
    with _merged(layers):
        merged = _features(model, images)
    change = (adapted - plain).norm()
    if not change > 0 or not (merged - adapted).norm() <= _CLOSE * change + _ROUNDING * plain.norm():
        return "merged adapters do not compute what unmerged ones do"
    return _mistaken_parts(model, layers, images)


def _is_timms_own(model: nn.Module) -> bool:
    """Of the classes that the tests show this for: a trial of ViT-B need not compute it again, for seconds."""
    blocks = getattr(model, "blocks", ())
    return type(model) is VisionTransformer and all(
        type(block) is Block and type(block.attn) is Attention and type(block.mlp) is Mlp for block in blocks
    )


def _without_effect(layers: dict[str, LoRALinear], features: Tensor) -> list[str]:
    """The layers on whose adapters the features do not depend."""
    if not features.requires_grad:
        return list(layers)
    factors = [layer.lora_B for layer in layers.values() if layer.lora_B is not None]
    seen = torch.linspace(1, 2, features.numel(), device=features.device).view_as(features) * features
    grads = torch.autograd.grad(seen.sum(), factors, allow_unused=True)
    return [
        name
        for name, grad in zip(layers, grads, strict=True)
        if grad is None or not (grad.is_meta or (grad.any() and grad.isfinite().all()))
    ]


def _mistaken_parts(model: nn.Module, layers: dict[str, LoRALinear], images: Tensor) -> str:
    """Show that a layer's last part is v and the one before it k: without values, no attention depends on its keys.

    Asked of layers that are adapted in part: where all of q, k and v are, their order does not matter.
    """
    asked = {
        block.attention: (layers[name], len(parts))
        for block in attention_blocks(model)
        for child, parts in block.projections.items()
        if (name := f"{block.attention}.{child}") in layers and parts[-1] == "v" and len(parts) > 1
        if sum(layers[name].sizes) < layers[name].out_features
    }
    seen: list[dict[str, Tensor]] = []
    for keys in (0.0, 1.0) if asked else ():
        outputs: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name, (layer, parts) in asked.items():
                hooks.enter_context(_hook(layer, partial(_without_values, parts=parts, keys=keys)))
                hooks.enter_context(_hook(model.get_submodule(name), partial(_keep, to=outputs, name=name)))
            _features(model, images)
        seen.append(outputs)
    for name in asked:
        without, other = (outputs[name] for outputs in seen)
        if not (without - other).norm() <= _ROUNDING * without.norm():
            return f"{cut(name)} does not hold q, k and v as equal parts one after another; set adapter.targets=q,k,v"
    return ""


def _without_values(_: nn.Module, __: object, out: Tensor, *, parts: int, keys: float) -> Tensor:
    """A layer's outputs with zeros for the values, and with other keys."""
    width = out.shape[-1] // parts
    out = out.detach().clone()
    out[..., -width:] = 0
    noise = torch.randn(out[..., :width].shape, generator=torch.Generator().manual_seed(0)).to(out)
    out[..., -2 * width : -width] += keys * noise
    return out


def _keep(_: nn.Module, __: object, out: Tensor | tuple[Tensor, ...], *, to: dict[str, Tensor], name: str) -> None:
    to[name] = (out if isinstance(out, Tensor) else out[0]).detach().float()


@contextmanager
def _hook(module: nn.Module, hook: partial[Tensor] | partial[None]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _watched(layers: dict[str, LoRALinear]) -> Iterator[set[str]]:
    """The names of the layers that are called while it is open."""
    called: set[str] = set()
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: called.add(name)) for name, layer in layers.items()
    ]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def _image_for(model: nn.Module) -> Tensor | None:
    """A random image of the model's size, None where there is nothing to show it to."""
    parameter, shape = next(model.parameters(), None), input_shape(model)
    if shape is None or parameter is None:
        return None
    return torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)).to(parameter)


def _features(model: nn.Module, images: Tensor) -> Tensor:
    try:
        features: Tensor = model(images)
    except Exception as error:  # whatever a model makes of an image that is not for it
        raise ConfigError(
            f"{type(model).__name__} cannot be adapted: it does not compute ({cut(error, 200)})"
        ) from None
    return features.float()


def _attach_random(layer: LoRALinear) -> None:
    generator = torch.Generator().manual_seed(0)
    A_RD = torch.randn(_RANK, layer.in_features, generator=generator, device="cpu") * layer.in_features**-0.5
    layer.attach(A_RD)
    assert layer.lora_B is not None
    with torch.no_grad():
        layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator, device="cpu"))


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
def _open_gates(model: nn.Module) -> Iterator[None]:
    """While open, scales and gates that begin shut, or nearly, as an untrained model's may, are ones."""
    shut = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.numel() in (1, max(parameter.shape, default=1)) and not name.endswith("bias")
        if not parameter.is_meta and not (parameter.abs() > _SHUT).any()
    }
    try:
        for name, parameter in shut.items():
            _put(model, name, nn.Parameter(torch.ones_like(parameter), requires_grad=False))
        yield
    finally:
        for name, parameter in shut.items():
            _put(model, name, parameter)


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """While open, the model is in eval mode; afterwards it has no adapters and the modes it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for _, layer in adapted_layers(model):
            layer.detach_adapter()
        for module in training:
            module.training = True
