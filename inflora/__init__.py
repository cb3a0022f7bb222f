"""Continual learning with interference-free low-rank adaptation, in plain PyTorch."""

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def load(path: str | PathLike[str]) -> "nn.Module":
    """The model in a run's folder, as ``inflora.serving.load`` gives it; torch is imported only now."""
    from inflora import serving

    return serving.load(path)
