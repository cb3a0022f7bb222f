"""Learnt tokens shown to a frozen vision transformer: before its blocks, or as extra keys and values inside them.

Shapes: B batch, N tokens, L prompt tokens, D width, E attention width, H heads.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from inflora.class_token import finish_attention
from inflora.config import ConfigError


class Encoded(NamedTuple):
    """Features (B x D) of images, and the penalties that training adds to their mean loss."""

    features: Tensor
    penalties: tuple[Tensor, ...] = ()


class Prompts(nn.Module, ABC):
    """Learnt tokens and what chooses them: parameters of its own, some of them new with every task."""

    @abstractmethod
    def shapes(self, vit: VisionTransformer, task: int) -> dict[str, tuple[int, ...]]:
        """The parameters that ``task`` adds, by name, with their shapes."""

    @abstractmethod
    def begin(self, vit: VisionTransformer, task: int, seed: int) -> None:
        """Add what ``task`` brings, and leave gradients to what it trains."""

    @abstractmethod
    def forward(self, vit: VisionTransformer, images: Tensor, task: int | None = None) -> Encoded:
        """Ask the backbone with prompts; ``task`` is known while it is learnt, and never when it is tested."""

    def learn(self, name: str, start: Tensor, like: Tensor) -> None:
        """A new parameter, trained, on the device of ``like``."""
        self.register_parameter(name, nn.Parameter(start.to(like.device)))

    def of_tasks(self, name: str) -> list[Tensor]:
        """The parameters ``<name>_0``, ``<name>_1``... of the tasks begun so far."""
        return [
            self.get_parameter(f"{name}_{task}")
            for task in range(sum(n.startswith(f"{name}_") for n in self._parameters))
        ]


def query(vit: VisionTransformer, images: Tensor) -> Tensor:
    """The query by which prompts are chosen: the features (B x D) of the model without any."""
    with torch.no_grad():
        return vit(images)


class PrefixAttention(Attention):
    """timm's attention with room for extra keys and values; without any, it computes what the plain one does."""

    prefix: tuple[Tensor, Tensor] | None

    def __init__(self, plain: Attention) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(plain.__dict__)  # the same submodules, under the same names
        self.prefix = None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self.prefix is None:
            return super().forward(x, attn_mask, is_causal)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        # Each in the precision of those it joins: one float32 part would make all keys, or values, float32.
        k, v = (
            torch.cat([self._per_head(prefix.to(part.dtype), len(x)), part], dim=2)
            for prefix, part in zip(self.prefix, (k, v), strict=True)
        )
        return finish_attention(self, nn.functional.scaled_dot_product_attention(q, k, v), x)

    def _per_head(self, prefix: Tensor, batch: int) -> Tensor:
        """(L x E) for all images or (B x L x E) for each, as (B x H x L x E/H)."""
        return prefix.expand(batch, -1, -1).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


def require_promptable(vit: nn.Module) -> None:
    """Raise ConfigError of models whose tokens prompts could not join: positions, windows and poolings of others."""
    if not isinstance(vit, VisionTransformer):
        raise ConfigError(f"{type(vit).__name__} cannot be prompted: only timm's VisionTransformer can be")


def make_promptable(vit: nn.Module, blocks: int, setting: str) -> None:
    """Give the attention of the first ``blocks`` blocks room for prefixes, in place.

    Raises:
        ConfigError: There are fewer blocks, or their attention is of another kind.
    """
    require_promptable(vit)
    layers = getattr(vit, "blocks", ())
    if blocks > len(layers):
        raise ConfigError(f"{setting} must be at most the backbone's depth {len(layers)}, got {blocks}")
    for index, block in enumerate(layers[:blocks]):
        if not isinstance(getattr(block, "attn", None), Attention):
            raise ConfigError(f"{type(vit).__name__} cannot be prompted: blocks.{index} has no plain attention 'attn'")
        block.attn = PrefixAttention(block.attn)


def attention(vit: VisionTransformer, block: int) -> PrefixAttention:
    """The attention of one block that has been made promptable."""
    layer = vit.get_submodule(f"blocks.{block}.attn")
    assert isinstance(layer, PrefixAttention)
    return layer


@contextmanager
def prefixed(vit: VisionTransformer, prefixes: Mapping[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """While open, block ``i`` attends also to ``prefixes[i]``: keys and values, (L x E) or (B x L x E) each."""
    layers = {index: attention(vit, index) for index in prefixes}
    try:
        for index, prefix in prefixes.items():
            layers[index].prefix = prefix
        yield
    finally:
        for layer in layers.values():
            layer.prefix = None


def prepended_features(vit: VisionTransformer, images: Tensor, tokens_BLD: Tensor) -> Tensor:
    """Mean (B x D) of what the model makes of ``tokens_BLD``, put before the image's own tokens (after positions)."""
    handle = vit.norm_pre.register_forward_pre_hook(lambda _, args: (torch.cat([tokens_BLD, args[0]], dim=1),))
    try:
        out_BND = vit.forward_features(images)
    finally:
        handle.remove()
    return vit.fc_norm(out_BND[:, : tokens_BLD.shape[1]].mean(dim=1))
