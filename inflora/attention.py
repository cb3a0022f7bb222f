"""The attention blocks of any vision model: the linear layers that can be adapted in them, and what the model looks at.

Found by names that timm gives them; whether adapters on them act is for ``inflora.probe`` to show.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

from inflora.config import Target
from inflora.lora import LoRALinear

_PROJECTIONS: tuple[dict[str, tuple[Target, ...]], ...] = (
    {"qkv": ("q", "k", "v")},
    {"q": ("q",), "k": ("k",), "v": ("v",)},
    {"q_proj": ("q",), "k_proj": ("k",), "v_proj": ("v",)},
    {"wq": ("q",), "wk": ("k",), "wv": ("v",)},
    {"q": ("q",), "kv": ("k", "v")},
    {"qk": ("q", "k"), "v": ("v",)},
)
"""The layers of an attention by name, and which of q, k, v the equal parts of their outputs are."""
_ATTENTION_ALONE = {"query"} | {name for layers in _PROJECTIONS for name in layers} - {"v"}
_OTHERS: dict[Target, tuple[tuple[str, ...], ...]] = {
    "attn.proj": (("proj",), ("out_proj",), ("o_proj",)),
    "mlp.fc1": (("fc1",), ("fc1_g", "fc1_x"), ("gate_proj", "up_proj")),
    "mlp.fc2": (("fc2",), ("down_proj",)),
}
"""The layers of every other target: a gated MLP makes gate and values by two."""


class Block(NamedTuple):
    """A block of a model: its own name, its attention's, and that attention's layers as in ``projections``."""

    name: str
    attention: str
    projections: dict[str, tuple[Target, ...]]


def attention_blocks(model: nn.Module) -> list[Block]:
    """The blocks whose attention makes q, k and v by linear layers, in order of depth.

    A block is part of a list: an attention that stands alone, as a pooling one does, is in none.
    """
    found = ((name, projections(module)) for name, module in _in_lists(model))
    return [Block(name.rpartition(".")[0], name, layers) for name, layers in found if layers]


def projections(attention: nn.Module) -> dict[str, tuple[Target, ...]]:
    """The linear layers that make q, k and v by name, each with the equal parts of its outputs; empty where none do."""
    for layers in _PROJECTIONS:
        if all(_can_have_parts(getattr(attention, name, None), len(parts)) for name, parts in layers.items()):
            return layers
    return {}


def _can_have_parts(layer: object, parts: int) -> bool:
    return is_linear(layer) and layer.out_features % parts == 0  # type: ignore[attr-defined]


def is_linear(layer: object) -> bool:
    """True of a layer that computes what PyTorch's linear one does: an adaptable one can take its place."""
    plain = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
    return plain or isinstance(layer, LoRALinear)


def layers_of(model: nn.Module, block: Block, target: Target) -> tuple[str, ...]:
    """The names of the linear layers that are a target other than q, k and v; empty where the block has none."""
    parent = block.attention if target == "attn.proj" else f"{block.name}.mlp".removeprefix(".")
    for names in _OTHERS[target]:
        paths = tuple(f"{parent}.{name}" for name in names)
        if all(is_linear(_descend(model, path)) for path in paths):
            return paths
    return ()


def _descend(model: nn.Module, path: str) -> object:
    found: object = model
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def why_no_attention(model: nn.Module) -> str:
    """Say what a model has in the place of attention blocks that could be adapted."""
    for name, module in _in_lists(model):
        for child, layer in module.named_children():
            if child in _ATTENTION_ALONE and is_linear(layer):
                return f"the {layer.out_features} outputs of {name}.{child} are not q, k and v"
            if child in _ATTENTION_ALONE:
                return f"{name}.{child} is a {type(layer).__name__}, no linear layer"
    return "it has no attention blocks"


def _in_lists(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if any(map(str.isdigit, name.split("."))))


def input_shape(model: nn.Module) -> tuple[int, int, int] | None:
    """Channels, height and width of the images that a model is built for; None where it does not say."""
    patches = getattr(model, "patch_embed", None)
    size: Sequence[int] | None = getattr(patches, "img_size", None)
    if isinstance(patches, nn.Module) and size is not None:
        first = next((module for module in patches.modules() if isinstance(module, nn.Conv2d)), None)
        if first is not None:
            return first.in_channels, size[0], size[1]
    config = getattr(model, "pretrained_cfg", None) or {}
    return config.get("input_size")
