"""Making a vision model adaptable: layers that can have adapters in the place of its blocks' linear ones."""

from collections.abc import Sequence

from torch import nn

from inflora.attention import attention_blocks, layers_of, why_no_attention
from inflora.config import ConfigError, Target
from inflora.lora import ALL, LoRALinear
from inflora.probe import prove_adaptable


def inject(
    model: nn.Module,
    blocks: int | None = None,
    targets: Sequence[Target] = ("k", "v"),
    layer_type: type[LoRALinear] = LoRALinear,
) -> None:
    """Make ``targets`` of the first ``blocks`` blocks (None: all) adaptable, in place.

    Those of q, k and v that one layer makes from one input share one adapter's A; every other layer has one of its own.

    Raises:
        ConfigError: The model has no attention blocks, fewer than ``blocks``, a block lacks the linear layer of a
            target, or adapters on it do not act as they must (``inflora.probe``).
    """
    found, kind = attention_blocks(model), type(model).__name__
    if not found:
        raise ConfigError(f"{kind} cannot be adapted: {why_no_attention(model)}")
    if blocks is not None and blocks > len(found):
        raise ConfigError(f"adapter.blocks must be at most the backbone's depth {len(found)}, got {blocks}")
    chosen: dict[str, tuple[slice, ...]] = {}
    for block in found[:blocks]:
        for name, parts in block.projections.items():
            layer = model.get_submodule(f"{block.attention}.{name}")
            if any(part in targets for part in parts):
                chosen[f"{block.attention}.{name}"] = _rows(layer.out_features, parts, targets)  # type: ignore[arg-type]
        for target in targets:
            if "." in target:
                names = layers_of(model, block, target)
                if not names:
                    raise ConfigError(f"{kind} cannot be adapted: {block.name} has no linear layer {target!r}")
                chosen |= dict.fromkeys(names, (ALL,))
    for path, rows in chosen.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer_type(model.get_submodule(path), rows))  # type: ignore[arg-type]
    prove_adaptable(model)


def _rows(outputs: int, parts: Sequence[Target], targets: Sequence[Target]) -> tuple[slice, ...]:
    """Find the chosen ones of the equal parts of a layer's outputs; neighbours are one slice."""
    width = outputs // len(parts)
    chosen = [index for index, part in enumerate(parts) if part in targets]
    starts = [index for index in chosen if index - 1 not in chosen]
    ends = [index + 1 for index in chosen if index + 1 not in chosen]
    return tuple(slice(start * width, end * width) for start, end in zip(starts, ends, strict=True))
