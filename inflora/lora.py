"""The adapter: a low-rank update of some of a linear layer's outputs, e.g. the keys and values of timm's fused ``qkv``.

Shapes: B batch, N tokens, D the layer's input width, R rank, O adapted outputs.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from inflora.config import ConfigError, Target

_OF_QKV: dict[Target, int] = {"q": 0, "k": 1, "v": 2}


class _AddLowRank(torch.autograd.Function):
    """``out[..., rows] += x A^T B^T`` in place, for the backward as little kept and moved as the mathematics needs.

    Autograd's own in-place addition to a slice copies the whole gradient of ``out``; here it goes on as it is. Of the
    inputs only ``x A^T`` (B x N x R) is kept, and ``x`` itself only where A is trained.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x_BND: Tensor, lora_A: Tensor, lora_B: Tensor, rows: Sequence[slice], sizes: list[int]
    ) -> Tensor:
        x_MD, A_RD, B_OR = x_BND.flatten(0, -2), lora_A.to(out.dtype), lora_B.to(out.dtype)
        read_MR = x_MD @ A_RD.T
        for part, B_part in zip(rows, B_OR.split(sizes), strict=True):
            out.view(-1, out.shape[-1])[:, part].addmm_(read_MR, B_part.T)
        ctx.mark_dirty(out)
        ctx.rows, ctx.sizes, ctx.of_x, ctx.of_B = rows, sizes, x_BND.shape, lora_B.dtype
        ctx.save_for_backward(read_MR, A_RD, B_OR, x_MD if lora_A.requires_grad else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        read_MR, A_RD, B_OR, x_MD = ctx.saved_tensors
        into_x, into_A, into_B = ctx.needs_input_grad[1:4]
        parts = [grad.flatten(0, -2)[:, part] for part in ctx.rows]
        grad_B = torch.cat([part.T @ read_MR for part in parts]).to(ctx.of_B) if into_B else None
        if not (into_x or into_A):
            return grad, None, None, grad_B, None, None
        grad_MR = torch.zeros_like(read_MR)
        for part, B_part in zip(parts, B_OR.split(ctx.sizes), strict=True):
            grad_MR.addmm_(part, B_part)
        grad_x = (grad_MR @ A_RD).view(ctx.of_x) if into_x else None
        grad_A = (grad_MR.T @ x_MD).to(ctx.of_B) if into_A else None
        return grad, grad_x, grad_A, grad_B, None, None


def in_autocast(x: Tensor) -> Tensor:
    """``x`` as a matrix product would cast it: once, where several products read it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class LoRALinear(nn.Linear):
    """A linear layer with an optional adapter on ``rows`` of its output.

    It takes over the plain layer's parameters and their names, so a state dict of the plain model fits. Without an
    adapter it computes what the plain layer does; with one, its weight's ``rows`` are ``W + B A``, where ``lora_A``
    (R x D) reads the input and ``lora_B`` (O x R) writes to those outputs; all other outputs stay as they are.
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None

    def __init__(self, plain: nn.Linear, rows: Sequence[slice] = (slice(None),)) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self.rows = tuple(rows)
        self.sizes = [len(range(plain.out_features)[part]) for part in self.rows]
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)

    def forward(self, x_BND: Tensor) -> Tensor:
        if self.lora_A is None or self.lora_B is None:
            return super().forward(x_BND)
        x_BND = in_autocast(x_BND)
        return self.add_low_rank(super().forward(x_BND), x_BND, self.lora_A, self.lora_B)

    def add_low_rank(self, out: Tensor, x_BND: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """``out`` with ``x A^T B^T`` added to the adapted outputs, in place; never the dense ``B A``."""
        result: Tensor = _AddLowRank.apply(out, x_BND, lora_A, lora_B, self.rows, self.sizes)
        return result

    def attach(self, lora_A: Tensor, *, train_A: bool = False) -> None:
        """Start an adapter at zero: ``lora_B`` is zero, so the layer's output does not change."""
        self.lora_A = nn.Parameter(lora_A.to(self.weight), requires_grad=train_A)
        self.lora_B = nn.Parameter(self.weight.new_zeros(sum(self.sizes), lora_A.shape[0]))

    def detach_adapter(self) -> tuple[Tensor, Tensor] | None:
        """Remove the adapter; its A and B, or None where there is none."""
        if self.lora_A is None or self.lora_B is None:
            return None
        factors = self.lora_A.detach(), self.lora_B.detach()
        self.lora_A = self.lora_B = None
        return factors

    def plain(self) -> nn.Linear:
        """An ordinary layer that computes the same; only where no adapter is being trained."""
        assert self.lora_A is None, "an adapter that is being trained is in no plain layer"
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight, layer.bias = nn.Parameter(self.merged_weight(), requires_grad=False), self.bias
        return layer

    def merged_weight(self) -> Tensor:
        """The weight, with all that has been learnt."""
        return self.weight.detach()

    @torch.no_grad()
    def merge(self) -> tuple[Tensor, Tensor] | None:
        """Add the adapter into the weight and remove it: the model does not grow with the tasks."""
        factors = self.detach_adapter()
        if factors is not None:
            self.add_update(self.weight, *factors)
        return factors

    def add_update(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
        """Add ``B A`` to the adapted rows of ``weight``, in place."""
        for rows, part in zip(self.rows, lora_B.split(self.sizes), strict=True):
            weight[rows] += part @ lora_A


def inject(
    vit: nn.Module,
    blocks: int | None = None,
    targets: Sequence[Target] = ("k", "v"),
    layer_type: type[LoRALinear] = LoRALinear,
) -> None:
    """Make ``targets`` of the first ``blocks`` blocks (None: all) adaptable, in place.

    q, k and v read the same input and share one adapter's A; every other target has an adapter of its own.

    Raises:
        ConfigError: The model has no blocks, fewer than ``blocks``, or a block lacks the linear layer of a target.
    """
    layers = getattr(vit, "blocks", None)
    kind = type(vit).__name__
    if not isinstance(layers, nn.Sequential | nn.ModuleList) or not len(layers):
        raise ConfigError(f"{kind} cannot be adapted: it has no list of transformer blocks named 'blocks'")
    if blocks is not None and blocks > len(layers):
        raise ConfigError(f"method.blocks must be at most the backbone's depth {len(layers)}, got {blocks}")
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


def _descend(module: nn.Module, names: Sequence[str]) -> nn.Module | None:
    found: nn.Module | None = module
    for name in names:
        found = getattr(found, name, None)
    return found


def _qkv_rows(width: int, targets: Sequence[Target]) -> tuple[slice, ...]:
    """Where the chosen ones of queries, keys and values are in the fused output; neighbours are one slice."""
    parts = sorted(_OF_QKV[target] for target in targets if target in _OF_QKV)
    starts = [part for part in parts if part - 1 not in parts]
    ends = [part + 1 for part in parts if part + 1 not in parts]
    return tuple(slice(start * width, end * width) for start, end in zip(starts, ends, strict=True))


def make_plain(model: nn.Module) -> None:
    """Put an ordinary layer in the place of every adaptable one, in place."""
    for name, layer in list(adapted_layers(model)):
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, layer.plain())


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The adaptable layers of ``model`` with their names, in order of depth."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What the attached adapters train."""
    factors = (factor for _, layer in adapted_layers(model) for factor in (layer.lora_A, layer.lora_B))
    return [factor for factor in factors if factor is not None and factor.requires_grad]


def merge_all(model: nn.Module) -> dict[str, Tensor]:
    """Merge every adapter of ``model`` into its layer; their factors, as ``<layer>.lora_A`` and ``<layer>.lora_B``."""
    learnt: dict[str, Tensor] = {}
    for name, layer in adapted_layers(model):
        factors = layer.merge()
        if factors is not None:
            learnt |= {f"{name}.lora_A": factors[0], f"{name}.lora_B": factors[1]}
    return learnt
