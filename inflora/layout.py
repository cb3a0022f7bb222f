"""The tensors that a saved state must hold: their names, shapes and types."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Spec(NamedTuple):
    """One tensor: each side is a number, or the numbers that it may be."""

    shape: tuple[int | range, ...]
    dtype: torch.dtype = torch.float32

    def admits(self, tensor: Tensor) -> bool:
        """True of a tensor of this shape and type."""
        sides = [side if isinstance(side, range) else range(side, side + 1) for side in self.shape]
        fits = len(sides) == tensor.dim() and all(n in side for n, side in zip(tensor.shape, sides, strict=True))
        return fits and tensor.dtype == self.dtype

    def __str__(self) -> str:
        sides = [f"{side.start}-{side.stop - 1}" if isinstance(side, range) else str(side) for side in self.shape]
        return f"{_of(self.dtype)} ({', '.join(sides)})"


Layout = Mapping[str, Spec]


def misfit(tensors: Mapping[str, Tensor], layout: Layout) -> str:
    """The first way in which ``tensors`` are not exactly those of ``layout``, or not finite; empty if they are."""
    if missing := sorted(layout.keys() - tensors.keys()):
        return f"{missing[0]} is missing"
    if unknown := sorted(tensors.keys() - layout.keys()):
        return f"{unknown[0][:80]} does not belong there"
    for name, spec in layout.items():
        tensor = tensors[name]
        if not spec.admits(tensor):
            return f"{name} must be {spec}, got {_of(tensor.dtype)} {tuple(tensor.shape)}"
        if not tensor.isfinite().all():
            return f"{name} holds numbers that are not finite"
    return ""


def _of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
