"""Frozen backbone: each task trains its classifier alone."""

from inflora.config import FrozenSettings
from inflora.methods.base import Method


class Frozen(Method[FrozenSettings]):
    """The pre-trained features as they are; whatever InfLoRA gains over this comes from adapting."""
