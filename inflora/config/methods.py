"""Published methods by name: each is a pair of an adapter and a classifier."""

from typing import Any

from inflora.config.adapters import ADAPTERS
from inflora.config.base import ConfigError
from inflora.config.classifiers import CLASSIFIERS
from inflora.config.messages import cut, listing
from inflora.config.run import RunConfig

METHODS: dict[str, dict[str, Any]] = {
    "inflora": {"adapter": "inflora", "classifier": "linear"},
    "inflora-ca": {"adapter": "inflora", "classifier": "aligned"},
    "sequential": {"adapter": "lora", "classifier": "linear"},
    "frozen": {"adapter": "none", "classifier": "linear"},
    "ncm": {"adapter": "none", "classifier": "ncm"},
    "slda": {"adapter": "none", "classifier": "lda"},
    "ranpac": {"adapter": "lora", "adapter.adapt_tasks": 1, "classifier": "ranpac"},
    "joint": {"adapter": "lora", "classifier": "linear", "data.joint": True},
    **{
        name: {"adapter": name, "classifier": "linear"}
        for name in ("olora", "sdlora", "l2p", "dualprompt", "codaprompt")
    },
}
"""Name in the papers' tables -> the settings that make it, each with its own defaults."""


def settings_of_method(name: str) -> dict[str, Any]:
    """The settings that make a published method.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in METHODS:
        raise ConfigError(f"unknown method {cut(repr(name))}; known: {listing(METHODS)}")
    return {"data.joint": False, **METHODS[name]}


def method_of(config: RunConfig) -> str:
    """The published name of a config's pair, else both names: "lora-ncm"."""
    pair: dict[str, Any] = {"adapter": config.adapter.name, "classifier": config.classifier.name}
    pair |= {"data.joint": True} if config.data.joint else {}
    tasks = getattr(config.adapter, "adapt_tasks", None)
    pair |= {} if tasks is None else {"adapter.adapt_tasks": tasks}
    published = (name for name, settings in METHODS.items() if settings == pair)
    unnamed = "-".join([*(["joint"] if config.data.joint else []), config.adapter.name, config.classifier.name])
    return next(published, unnamed)


def felt_after_first_task() -> frozenset[str]:
    """The settings that change nothing before the second task."""
    groups = {"adapter": ADAPTERS, "classifier": CLASSIFIERS}
    return frozenset(f"{group}.{n}" for group, models in groups.items() for m in models.values() for n in m.felt_later)
