"""The adapter: a low-rank update of some of a linear layer's outputs, e.g. the keys and values of timm's fused ``qkv``.

Shapes: B batch, N tokens, M = B N, D the layer's input width, R rank, O adapted outputs.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _AdaptedLinear(torch.autograd.Function):
    """``x (W + P B A)^T + b`` with W and b frozen and P placing B's rows at ``rows``, with as few passes over the
    activations as the mathematics needs: they cost more than the rank's few products.

    In float32 the sum ``W + P B A`` is made (a weight is small beside a batch's activations), and the layer costs what
    a plain one does. Where products read fewer bits of it, bfloat16's or TensorFloat-32's, the sum would lose small
    updates: there ``x A^T B^T`` is added to the output. Of the inputs only ``x A^T`` (M x R) is kept for the backward,
    and ``x`` itself only where A is trained.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BND: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        rows: Sequence[slice],
        sizes: list[int],
    ) -> Tensor:
        x_MD, A_RD, B_OR = x_BND.flatten(0, -2), lora_A.to(weight.dtype), lora_B.to(weight.dtype)
        ctx.summed = weight.itemsize >= 4 and torch.backends.cuda.matmul.fp32_precision != "tf32"
        read_MR: Tensor | None
        if ctx.summed:
            read_MR = x_MD @ A_RD.T if lora_B.requires_grad else None
            out = nn.functional.linear(x_MD, _summed(weight, A_RD, B_OR, rows, sizes), bias)
        else:
            read_MR = x_MD @ A_RD.T
            out = nn.functional.linear(x_MD, weight, bias)
            for part, B_part in zip(rows, B_OR.split(sizes), strict=True):
                out[:, part].addmm_(read_MR, B_part.T)
        ctx.rows, ctx.sizes, ctx.input_shape, ctx.factor_dtype = rows, sizes, x_BND.shape, lora_B.dtype
        ctx.save_for_backward(read_MR, weight, A_RD, B_OR, x_MD if lora_A.requires_grad else None)
        # Not a view to autograd: some attentions (EVA's) add their biases to it in place.
        return torch.ops.aten._unsafe_view(out, [*x_BND.shape[:-1], out.shape[-1]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        read_MR, weight, A_RD, B_OR, x_MD = ctx.saved_tensors
        into_x, into_A, into_B = (ctx.needs_input_grad[place] for place in (0, 3, 4))
        grad_MO = grad.flatten(0, -2)
        parts = [grad_MO[:, part] for part in ctx.rows]
        grad_x = grad_A = grad_B = None
        if into_B:
            grad_B = torch.cat([part.T @ read_MR for part in parts]).to(ctx.factor_dtype)
        if into_A or (into_x and not ctx.summed):
            grad_MR = grad_MO.new_zeros(len(grad_MO), len(A_RD))
            for part, B_part in zip(parts, B_OR.split(ctx.sizes), strict=True):
                grad_MR.addmm_(part, B_part)
        if into_A:
            grad_A = (grad_MR.T @ x_MD).to(ctx.factor_dtype)
        if into_x and ctx.summed:
            grad_x = (grad_MO @ _summed(weight, A_RD, B_OR, ctx.rows, ctx.sizes)).view(ctx.input_shape)
        elif into_x:
            grad_x = (grad_MO @ weight).addmm_(grad_MR, A_RD).view(ctx.input_shape)
        return grad_x, None, None, grad_A, grad_B, None, None


def _summed(weight: Tensor, A_RD: Tensor, B_OR: Tensor, rows: Sequence[slice], sizes: list[int]) -> Tensor:
    """``W + P B A``."""
    whole = weight.clone()
    for part, B_part in zip(rows, B_OR.split(sizes), strict=True):
        whole[part].addmm_(B_part, A_RD)
    return whole


def in_autocast(x: Tensor) -> Tensor:
    """``x`` as a matrix product would cast it: once, where several products read it."""
    kind = x.device.type
    if kind == "meta":  # where nothing is computed, there is no precision to compute in
        return x
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


ALL = slice(None)


class LoRALinear(nn.Linear):
    """A linear layer with an optional adapter on ``rows`` of its output.

    It takes over the plain layer's parameters and their names, so a state dict of the plain model fits. Without an
    adapter it computes what the plain layer does; with one, its weight's ``rows`` are ``W + B A``, where ``lora_A``
    (R x D) reads the input and ``lora_B`` (O x R) writes to those outputs; all other outputs stay as they are.
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    held: Tensor | None
    within: Tensor | None

    def __init__(self, plain: nn.Linear, rows: Sequence[slice] = (ALL,)) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        self.weight, self.bias, self.training = plain.weight, plain.bias, plain.training
        self.rows = tuple(slice(*part.indices(plain.out_features)) for part in rows)
        self.sizes = [part.stop - part.start for part in self.rows]
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        # The weight in a lower precision, beside the float32 one that updates are merged into.
        self.register_buffer("held", None, persistent=False)
        self.register_buffer("within", None, persistent=False)

    def forward(self, x_BND: Tensor, outputs: slice = ALL) -> Tensor:
        """The layer's ``outputs`` (all, unless some are asked for)."""
        x_BND, factors = in_autocast(x_BND), self.factors()
        weight = (self.weight if self.held is None else self.held)[outputs].to(x_BND.dtype)
        bias = None if self.bias is None else self.bias[outputs].to(x_BND.dtype)
        written = self._written(outputs)
        if factors is None or not written:
            return nn.functional.linear(x_BND, weight, bias)
        lora_A, lora_B = factors
        if len(written) < len(self.rows) or outputs != ALL:
            lora_B = torch.cat([lora_B[rows_of_B] for _, rows_of_B in written])
        rows = [rows for rows, _ in written]
        sizes = [part.stop - part.start for part in rows]
        result: Tensor = _AdaptedLinear.apply(x_BND, weight, bias, lora_A, lora_B, rows, sizes)
        return result

    def _written(self, outputs: slice) -> list[tuple[slice, slice]]:
        """Which of the ``outputs``, counted among them, the adapter writes to, each with its rows of B."""
        first, end, _ = outputs.indices(self.out_features)
        written, row_of_B = [], 0
        for part, size in zip(self.rows, self.sizes, strict=True):
            start, stop = max(part.start, first), min(part.stop, end)
            if start < stop:
                offset = row_of_B - part.start
                written.append((slice(start - first, stop - first), slice(start + offset, stop + offset)))
            row_of_B += size
        return written

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """A (R x D) and B (O x R) of what is added to the weight, None where nothing is."""
        if self.lora_A is None or self.lora_B is None:
            return None
        if self.within is None:
            return self.lora_A, self.lora_B
        # In float32 whatever the backbone's products are: rounded, A would reach out of its subspace.
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return self.lora_A @ self.within, self.lora_B

    def hold(self, dtype: torch.dtype) -> None:
        """Keep the weight in ``dtype`` too, and the bias, which never changes, in nothing else: no step casts them."""
        self.held = self.weight.detach().to(dtype)
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)

    def attach(
        self, lora_A: Tensor, *, train_A: bool = False, within: Tensor | None = None, lora_B: Tensor | None = None
    ) -> None:
        """Start an adapter: with a zero B that is trained the layer's output does not change.

        ``within`` (D x D) projects the rows of an A that is trained onto a subspace; None: they may go anywhere.
        A ``lora_B`` that is given stays as it is.
        """
        self.within = None if within is None else within.to(self.weight)
        self.lora_A = nn.Parameter(lora_A.to(self.weight), requires_grad=train_A)
        zeros = self.weight.new_zeros(sum(self.sizes), lora_A.shape[0])
        self.lora_B = nn.Parameter(zeros if lora_B is None else lora_B.to(self.weight), requires_grad=lora_B is None)

    def detach_adapter(self, share: float = 1.0) -> tuple[Tensor, Tensor] | None:
        """Remove the adapter; its A and this share of its B, or None where there is none."""
        factors = LoRALinear.factors(self)
        if factors is None:
            return None
        self.lora_A = self.lora_B = self.within = None
        return factors[0].detach(), share * factors[1].detach()

    def plain(self) -> nn.Linear:
        """An ordinary layer that computes the same; only where no adapter is being trained."""
        assert self.lora_A is None, "an adapter that is being trained is in no plain layer"
        assert self.held is None, "a layer whose bias is held in another precision is none that could be used alone"
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight, layer.bias = nn.Parameter(self.merged_weight(), requires_grad=False), self.bias
        return layer

    def merged_weight(self) -> Tensor:
        """The weight, with all that has been learnt."""
        return self.weight.detach()

    @torch.no_grad()
    def merge(self, share: float = 1.0) -> tuple[Tensor, Tensor] | None:
        """Add this share of the adapter into the weight and remove it: the model does not grow with the tasks.

        Its A, and the share of its B.
        """
        factors = self.detach_adapter(share)
        if factors is not None:
            self.fold_in(*factors)
        return factors

    @torch.no_grad()
    def fold_in(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Add ``B A`` to the layer's own weight."""
        self.add_update(self.weight, lora_A, lora_B)
        if self.held is not None:
            self.held.copy_(self.weight)

    def add_update(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
        """Add ``B A`` to the adapted rows of ``weight``, in place."""
        for rows, part in zip(self.rows, lora_B.split(self.sizes), strict=True):
            weight[rows] += part @ lora_A


def make_plain(model: nn.Module) -> None:
    """Put an ordinary layer in the place of every adaptable one, in place."""
    for name, layer in list(adapted_layers(model)):
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, layer.plain())


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The adaptable layers of ``model`` with their names, in order of depth."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the attached adapters train."""
    factors = (factor for _, layer in adapted_layers(model) for factor in (layer.lora_A, layer.lora_B))
    return [factor for factor in factors if factor is not None and factor.requires_grad]


def merge_all(model: nn.Module, share: float = 1.0) -> dict[str, Tensor]:
    """Merge this share of every adapter of ``model`` into its layer.

    What is merged comes back as factors, ``<layer>.lora_A`` and ``<layer>.lora_B``.
    """
    learnt: dict[str, Tensor] = {}
    for name, layer in adapted_layers(model):
        factors = layer.merge(share)
        if factors is not None:
            learnt |= {f"{name}.lora_A": factors[0], f"{name}.lora_B": factors[1]}
    return learnt


def short_name(layer: str) -> str:
    """``backbone.blocks.3.attn.qkv`` as ``block3``, its other layers as ``block3.mlp.fc1``: for names of metrics.

    Models whose blocks are in several lists: ``backbone.layers.1.blocks.3.attn.qkv`` as ``layers.1.blocks.3``.
    """
    name = layer.removeprefix("backbone.").removesuffix(".attn.qkv")
    return re.sub(r"^blocks\.(\d+)", r"block\1", name)
