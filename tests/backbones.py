"""docs/backbones.md: every kind of timm model that has attention, and whether it is admitted.

python -m tests.backbones     writes it anew, in some minutes: every model of timm is built without weights, and the
                              smallest of each kind once more with random ones
"""

import re
import warnings
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
INTRODUCTION = """# Backbones

Every kind of model in timm {version} that has attention, with the smallest of its kind as an example: one with random
weights (and two blocks, where it takes `depth`) has shown that adapters on its keys and values act, that gradients
reach them, that merging them changes nothing and that what they read is seen, or it is refused in the words that a user
gets. Models of a module and a class whose attentions and pooling are the same are of one kind.
`python -m tests.backbones` writes this page.

What is adapted: the number of layers, by name. Features are what timm pools; `backbone.options.global_pool=avg` may
choose otherwise.
"""


class Kind(NamedTuple):
    """What models have in common that are admitted or refused alike."""

    module: str
    model: str
    attention: str
    pooling: str


class Row(NamedTuple):
    """A line of the page's table."""

    module: str
    example: str
    models: str
    attention: str
    pooling: str
    admitted: str


def page() -> str:
    """The page, from timm as it is installed."""
    head = ["module", "example", "models", "queries, keys, values by", "pooling", "admitted"]
    table = [head, ["---"] * len(head), *rows()]
    body = "".join(f"| {' | '.join(line)} |\n" for line in table)
    return f"{INTRODUCTION.format(version=timm.__version__)}\n{body}"


def rows() -> list[Row]:
    """A row for every kind, module after module."""
    of_kind: dict[Kind, list[tuple[int, str]]] = {}
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            if found := kind_of(name, module):
                of_kind.setdefault(found[0], []).append((found[1], name))
    return [_row(kind, [name for _, name in sorted(models)]) for kind, models in sorted(of_kind.items())]


def _row(kind: Kind, models: list[str]) -> Row:
    said = admission(models[0])
    return Row(kind.module, models[0], str(len(models)), f"{kind.model}, {kind.attention}", kind.pooling, said)


def rows_of(text: str) -> list[Row]:
    """The rows of the page's table."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [Row(*line) for line in lines[2:]]


def kind_of(name: str, module: str) -> tuple[Kind, int] | None:
    """The kind of a timm model, and its number of weights; None where it has no attention."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model(name, num_classes=0)
    in_lists = (part for path, part in model.named_modules() if re.search(r"\.\d+(\.|$)", path))
    kinds = {_described(part) for part in in_lists} - {""}
    if not kinds:
        return None
    numbers = sum(parameter.numel() for parameter in model.parameters())
    return Kind(module, type(model).__name__, "; ".join(sorted(kinds)), _pooling(model)), numbers


def _described(part: nn.Module) -> str:
    """An attention's class and the layers of its queries, keys and values; empty for what is none."""
    kind, queries = type(part).__name__, ("q", "qk", "qkv", "q_proj", "wq", "query")
    if found := projections(part):
        return f"{kind}: {', '.join(found)}"
    return "".join(f"{kind}: {n} is {type(child).__name__}" for n, child in part.named_children() if n in queries)


def _pooling(model: nn.Module) -> str:
    pool = getattr(model, "global_pool", None) or getattr(getattr(model, "head", None), "global_pool", None)
    pool = getattr(pool, "pool_type", pool)
    return POOLS.get(pool, "its own") if isinstance(pool, str) else "its own"


def admission(example: str) -> str:
    """What becomes of a model as a user names it: the layers that are adapted, or the line that refuses it."""
    try:
        return f"yes: {_adapted(example, ('k', 'v'))}"
    except ConfigError as error:
        refused = re.sub(r"^(backbone.name|\w+ cannot be adapted)[^:]*: ", "", str(error))
    if "adapter.targets=q,k,v" not in refused:
        return f"no: {refused}"
    return f"with `adapter.targets=q,k,v`: {_adapted(example, ('q', 'k', 'v'))}"


def _adapted(example: str, targets: tuple[Target, ...]) -> str:
    """The adapted layers by the ends of their names, each with how many there are."""
    whole = meta_backbone(BackboneSettings(name=example, pretrained=False))
    inject(whole, targets=targets)
    inject(build_backbone(_small(example)), targets=targets)
    ends = [re.sub(r"^.*\.\d+\.", "", name) for name, _ in adapted_layers(whole)]
    return ", ".join(f"{ends.count(end)} `{end}`" for end in dict.fromkeys(ends))


def _small(example: str) -> BackboneSettings:
    whole, two = (BackboneSettings(name=example, pretrained=False, options=options) for options in ({}, {"depth": 2}))
    try:
        meta_backbone(two)
    except ConfigError:  # its depth is not one number
        return whole
    return two


if __name__ == "__main__":
    PAGE.write_text(page())
