"""Continual learning methods; a method is one file and one line here (and its settings in ``inflora.config``)."""

from typing import Any

from inflora.config import MethodSettings
from inflora.methods.base import Method, TaskData
from inflora.methods.frozen import Frozen
from inflora.methods.inflora import InfLoRA
from inflora.methods.joint import Joint
from inflora.methods.sequential import Sequential

METHODS: dict[str, type[Method[Any]]] = {
    "inflora": InfLoRA,
    "sequential": Sequential,
    "frozen": Frozen,
    "joint": Joint,
}

__all__ = ["METHODS", "Method", "TaskData", "make_method"]


def make_method(settings: MethodSettings) -> Method[Any]:
    """The method that ``settings`` describes, before its first task."""
    return METHODS[settings.name](settings)
