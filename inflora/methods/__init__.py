"""Continual learning methods; a method is one file and one line here (and its settings in ``inflora.config``)."""

from typing import Any

from inflora.config import MethodSettings
from inflora.methods.base import Method, TaskData
from inflora.methods.codaprompt import CODAPrompt
from inflora.methods.dualprompt import DualPrompt
from inflora.methods.frozen import Frozen
from inflora.methods.inflora import InfLoRA
from inflora.methods.joint import Joint
from inflora.methods.l2p import L2P
from inflora.methods.ncm import NCM
from inflora.methods.olora import OLoRA
from inflora.methods.sdlora import SDLoRA
from inflora.methods.sequential import Sequential

METHODS: dict[str, type[Method[Any]]] = {
    "inflora": InfLoRA,
    "sequential": Sequential,
    "frozen": Frozen,
    "joint": Joint,
    "ncm": NCM,
    "olora": OLoRA,
    "sdlora": SDLoRA,
    "l2p": L2P,
    "dualprompt": DualPrompt,
    "codaprompt": CODAPrompt,
}

__all__ = ["METHODS", "Method", "TaskData", "make_method"]


def make_method(settings: MethodSettings) -> Method[Any]:
    """The method that ``settings`` describes, before its first task."""
    return METHODS[settings.name](settings)
