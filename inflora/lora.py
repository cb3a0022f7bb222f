"""The adapter: low-rank updates of the keys and values in timm's fused ``qkv`` projection.

Shapes: B batch, N tokens, D width, E attention width (D unless heads are resized), R rank.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from inflora.config import ConfigError


class LoRAQKV(nn.Linear):
    """A fused ``qkv`` linear layer with an optional adapter on its keys and values.

    It keeps the layer's own parameter names, so a state dict of the plain model fits. Without an adapter it computes
    what the plain layer does; with one, ``W + [0; B A]``, where ``lora_A`` (R x D) reads the input and ``lora_B``
    (2E x R, rows [k; v]) writes to keys and values. Queries are never adapted.
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)

    def forward(self, x_BND: Tensor) -> Tensor:
        qkv = super().forward(x_BND)
        if self.lora_A is None or self.lora_B is None:
            return qkv
        keys_values = qkv[..., self._first_key_row :]
        keys_values += nn.functional.linear(nn.functional.linear(x_BND, self.lora_A), self.lora_B)
        return qkv

    def attach(self, lora_A: Tensor, *, train_A: bool = False) -> None:
        """Start an adapter at zero: ``lora_B`` is zero, so the layer's output does not change."""
        rows = self.out_features - self._first_key_row
        self.lora_A = nn.Parameter(lora_A.to(self.weight), requires_grad=train_A)
        self.lora_B = nn.Parameter(self.weight.new_zeros(rows, lora_A.shape[0]))

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter into the weight and remove it: the model does not grow with the tasks."""
        if self.lora_A is None or self.lora_B is None:
            return
        self.weight[self._first_key_row :] += self.lora_B @ self.lora_A
        self.lora_A = self.lora_B = None

    @property
    def _first_key_row(self) -> int:
        return self.out_features // 3


def inject(vit: nn.Module, blocks: int | None = None) -> None:
    """Make the fused ``qkv`` of the first ``blocks`` blocks (None: all) adaptable, in place.

    Raises:
        ConfigError: The model has no blocks with a fused ``qkv`` linear layer, or fewer than ``blocks``.
    """
    layers = getattr(vit, "blocks", None)
    kind = type(vit).__name__
    if not isinstance(layers, nn.Sequential | nn.ModuleList) or not len(layers):
        raise ConfigError(f"{kind} cannot be adapted: it has no list of transformer blocks named 'blocks'")
    if blocks is not None and blocks > len(layers):
        raise ConfigError(f"method.blocks must be at most the backbone's depth {len(layers)}, got {blocks}")
    for index, block in enumerate(layers[:blocks]):
        attention = getattr(block, "attn", None)
        qkv = getattr(attention, "qkv", None)
        if not isinstance(qkv, nn.Linear) or qkv.out_features % 3:
            raise ConfigError(f"{kind} cannot be adapted: blocks.{index}.attn has no fused linear 'qkv'")
        assert isinstance(attention, nn.Module)
        attention.qkv = LoRAQKV(qkv)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoRAQKV]]:
    """The adaptable layers of ``model`` with their names, in order of depth."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRAQKV))


def merge_all(model: nn.Module) -> None:
    """Merge every adapter of ``model`` into its layer."""
    for _, layer in adapted_layers(model):
        layer.merge()
