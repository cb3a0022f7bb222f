"""What adapts the backbone; an adapter is one file here, a settings model and one line in ``inflora.config``."""

from typing import Any

from inflora.adapters.base import Adapter
from inflora.config import Alternative, build

__all__ = ["Adapter", "make_adapter"]


def make_adapter(settings: Alternative) -> Adapter[Any]:
    """The adapter that ``settings`` describes, before its first task."""
    adapter: Adapter[Any] = build(settings)
    return adapter
