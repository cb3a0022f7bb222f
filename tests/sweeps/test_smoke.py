"""Every recipe's ``--smoke``: what its sweeps try must fit the tiny model and the generated images."""

import importlib
from pathlib import Path

import pytest

import sweeps
from inflora.config import CODAPromptSettings, DualPromptSettings, LoRASettings
from inflora.setup import check
from sweeps.engine.run.smoke import prepare_sample, shrink
from sweeps.engine.space.domains import Integer
from sweeps.engine.space.spec import Sweep

RECIPES = {file.stem for file in Path(sweeps.__path__[0]).glob("*.py")} - {"__init__", "cli"}


def sweeps_of(recipe: str) -> list[Sweep]:
    module = importlib.import_module(f"sweeps.{recipe}")
    return [value for value in vars(module).values() if isinstance(value, Sweep)]


ALL = {sweep.name: sweep for recipe in sorted(RECIPES) for sweep in sweeps_of(recipe)}


@pytest.mark.parametrize("name", ALL)
def test_a_sweep_in_small_accepts_whatever_its_space_can_propose(name, tmp_path):
    small = shrink(ALL[name], tmp_path)
    assert small.space == ALL[name].space
    prepare_sample(small)
    for config in small.extreme_configs():
        check(config)


@pytest.mark.parametrize("adapter", [DualPromptSettings(), CODAPromptSettings(), LoRASettings(blocks=7)])
def test_it_has_the_blocks_that_an_adapter_names(adapter, tmp_path):
    base = ALL["digits"].base.model_copy(update={"adapter": adapter})
    changes = {"base": base, "space": {"optim.lr": ALL["digits"].space["optim.lr"]}, "first": ()}
    check(shrink(ALL["digits"].model_copy(update=changes), tmp_path).base)


def test_it_is_as_large_as_its_space_asks_for_and_no_larger(tmp_path):
    widths = {}
    for high in (64, 65, 500):
        sweep = ALL["digits"].model_copy(update={"space": {"adapter.rank": Integer(low=1, high=high)}, "first": ()})
        widths[high] = shrink(sweep, tmp_path).base.backbone.options["embed_dim"]
    assert widths == {64: 64, 65: 128, 500: 512}
