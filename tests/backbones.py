"""docs/backbones.md: every kind of timm model that has attention, and whether it is admitted.

python -m tests.backbones     writes it anew, in some minutes: every model is built without weights, one of a kind with
"""

import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import nn

from inflora.attention import projections
from inflora.backbone import build_backbone, meta_backbone
from inflora.config import BackboneSettings, ConfigError, Target
from inflora.injection import inject
from inflora.lora import adapted_layers

PAGE = Path(__file__).parents[1] / "docs" / "backbones.md"
POOLS = {"token": "class token", "avg": "mean", "map": "attention", "max": "maximum", "avgmax": "mean and maximum"}
SMALL = ({"depth": 2}, {})
"""Options that make an example small, the first of them that it takes."""


class Kind(NamedTuple):
    """What models have in common that are admitted or refused alike."""

    module: str
    model: str
    attention: str
    pooling: str


class Row(NamedTuple):
    """A line of the page's table."""

    module: str
    model: str
    example: str
    models: str
    attention: str
    pooling: str
    admitted: str


def kind_of(name: str, module: str) -> tuple[Kind, int] | None:
    """The kind of a timm model, and its number of weights; None where it has no attention."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model(name, num_classes=0)
    kinds = {_described(part) for path, part in model.named_modules() if re.search(r"\.\d+(\.|$)", path)} - {""}
    if not kinds:
        return None
    numbers = sum(parameter.numel() for parameter in model.parameters())
    return Kind(module, type(model).__name__, "; ".join(sorted(kinds)), _pooling(model)), numbers


def _described(part: nn.Module) -> str:
    """An attention's class and the layers of its queries, keys and values; empty for what is none."""
    layers = {
        name: child for name, child in part.named_children() if name in ("q", "qk", "qkv", "q_proj", "wq", "query")
    }
    if layers and projections(part):
        return f"{type(part).__name__}: {', '.join(projections(part))}"
    return "".join(f"{type(part).__name__}: {name} by {type(child).__name__}" for name, child in layers.items())


def _pooling(model: nn.Module) -> str:
    pool = getattr(model, "global_pool", None) or getattr(getattr(model, "head", None), "global_pool", None)
    pool = getattr(pool, "pool_type", pool)
    return POOLS.get(pool, "its own") if isinstance(pool, str) else "its own"


def admission(example: str, targets: tuple[Target, ...] = ("k", "v")) -> str:
    """What becomes of a model as a user names it: the layers that are adapted, or the line that refuses it."""
    try:
        settings = _small(example)
        whole = meta_backbone(BackboneSettings(name=example, pretrained=False))
        inject(whole, targets=targets)
        inject(build_backbone(settings), targets=targets)
    except ConfigError as error:
        return f"no: {str(error).partition(': ')[2]}"
    return f"yes: {_listed(name for name, _ in adapted_layers(whole))}"


def _small(example: str) -> BackboneSettings:
    for options in SMALL:
        settings = BackboneSettings(name=example, pretrained=False, options=options)
        try:
            meta_backbone(settings)
        except ConfigError as error:
            if "backbone.options" not in str(error):
                raise
        else:
            return settings
    raise AssertionError("no options always do, or the name is refused")


def _listed(names: Iterable[str]) -> str:
    """Layers by the ends of their names, each with how many there are."""
    ends = [".".join(re.sub(r"^.*\.\d+\.", "", name).split(".")) for name in names]
    return ", ".join(f"{ends.count(end)} `{end}`" for end in dict.fromkeys(ends))
