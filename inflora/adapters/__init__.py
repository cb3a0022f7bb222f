"""Adapters change the backbone while a task is learnt; each has its settings model in ``inflora.config.adapters``."""

from typing import Any

from inflora.adapters.base import Adapter
from inflora.adapters.first_tasks import FirstTasks
from inflora.config import Alternative, build

__all__ = ["Adapter", "make_adapter"]


def make_adapter(settings: Alternative) -> Adapter[Any]:
    """The adapter that ``settings`` describes, before its first task."""
    adapter: Adapter[Any] = build(settings)
    tasks = getattr(settings, "adapt_tasks", None)
    return adapter if tasks is None else FirstTasks(adapter, tasks)
