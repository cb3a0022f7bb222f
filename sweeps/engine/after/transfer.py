"""Settings found on one dataset, judged on another: a two-phase evaluation between datasets (arXiv 2403.09066).

The paper tunes on one dataset and evaluates on another with as many tasks, and finds that what is tuned on the
evaluated one flatters. The settings that a search has found here are put into another dataset's own config, everything
else stays as it is there, and both are trained over the same seeds. Beside them stand, where a search was made there
too, the settings that it has found. (Protocol two-phase of a sweep is another thing: one dataset, other class orders.)
"""

import json
import re
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from inflora.config import ConfigError, RunConfig, load_config, override
from inflora.data.tasks import in_numbers
from inflora.errors import one_line
from inflora.presets import PRESETS
from sweeps.engine.after.export import find_best, read_trials
from sweeps.engine.ledger.reading import read_kept
from sweeps.engine.space.spec import Sweep

THERE, FOUND_THERE = "default", "found-there"
"""The labels of a dataset's own settings, and of those that a search there has found."""


class Found(NamedTuple):
    """Settings that a search has found: its name, their values, and the run that they were found with."""

    name: str
    settings: Mapping[str, Any]
    config: RunConfig


class Transfer(NamedTuple):
    """Settings that are judged on another dataset: where, whose, and the configs to train, by label."""

    on: str
    label: str
    found: Found
    beside: Found | None
    configs: dict[str, RunConfig]


def found_by_sweep(address: str) -> Found:
    """The settings of a sweep's best trial.

    Raises:
        ConfigError: No sweep is there, or no trial of it has finished.
    """
    sweep, study, _ = read_kept(address)
    best = find_best(sweep, *read_trials(sweep, study))
    return Found(sweep.name, best.settings, sweep.config(best.settings))


def found_in_config(path: Path) -> Found:
    """The searched settings of an exported config, as they stand in it.

    Raises:
        ConfigError: It is no export of a sweep, or one that does not say what was searched.
    """
    config = load_config(path)
    searched = config.provenance.get("searched")
    if not isinstance(searched, list) or not searched:
        raise ConfigError(f"{path} does not say which settings were searched; export it again, or name the sweep")
    sweep = str(config.provenance.get("sweep"))
    if not re.fullmatch(r"[\w.-]{1,100}", sweep):
        raise ConfigError(f"provenance.sweep in {path} must be a sweep's name, got {one_line(sweep, 100)!r}")
    return Found(sweep, {str(name): _value(config, str(name)) for name in searched}, config)


def _value(config: RunConfig, path: str) -> Any:
    value: Any = config.model_dump()
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            raise ConfigError(f"provenance.searched names {path}, which the config does not have")
        value = value[name]
    return value


def config_on(on: str) -> tuple[str, RunConfig]:
    """The name and the own settings of a dataset's run, on all its training images.

    ``on`` is a preset; a recipe, ``FILE.py`` or ``FILE.py:SWEEP``, whose first settings count; or a config file.

    Raises:
        ConfigError: It is none of them.
    """
    file, _, sweep = on.partition(".py:")
    if on in PRESETS:
        return on, PRESETS[on].config
    if sweep or on.endswith(".py"):
        of_recipe = _sweep_of(Path(f"{file}.py") if sweep else Path(on), sweep)
        name, config = of_recipe.name, of_recipe.config(of_recipe.first[0] if of_recipe.first else {})
    elif on.endswith((".yaml", ".yml")):
        name, config = Path(on).stem, load_config(Path(on))
    else:
        raise ConfigError(
            f"--on must be a recipe (.py), a config (.yaml) or a preset, got {one_line(on, 200)!r}; "
            f"presets: {', '.join(PRESETS)}"
        )
    return name, override(in_numbers(config), {"data.train_on": "train+validation"})


def _sweep_of(recipe: Path, name: str) -> Sweep:
    """A recipe's sweep of that name, or its first."""
    try:
        values = runpy.run_path(str(recipe), run_name="recipe")
    except Exception as error:  # whatever a user's file does
        raise ConfigError(f"cannot read the recipe {recipe}: {type(error).__name__}: {error}") from None
    sweeps = {value.name: value for value in values.values() if isinstance(value, Sweep)}
    if not sweeps or (name and name not in sweeps):
        raise ConfigError(f"no sweep {name or 'at all'} in {recipe}; it has: {', '.join(sweeps) or 'none'}")
    return sweeps[name] if name else next(iter(sweeps.values()))


def plan_transfer(found: Found, on: str, beside: Found | None = None) -> Transfer:
    """What is to be trained: a dataset's own settings, and the same with those that were found elsewhere and there.

    Raises:
        ConfigError: Settings that do not apply there, or a search beside that was made on another dataset.
    """
    name, there = config_on(on)
    return transfer(found, name, there, beside)


def transfer(found: Found, name: str, there: RunConfig, beside: Found | None = None) -> Transfer:
    """As ``plan_transfer``, given the other dataset's name and own settings.

    Raises:
        ConfigError: As ``plan_transfer``.
    """
    if beside and beside.config.data.dataset != there.data.dataset:
        raise ConfigError(
            f"--beside must be a search on {there.data.dataset}, where {found.name} is judged, got {beside.name} on "
            f"{beside.config.data.dataset}"
        )
    label = f"from-{found.name}"
    configs = {THERE: there, label: _put(found, name, there)}
    if beside:
        configs[FOUND_THERE] = _put(beside, name, there)
    return Transfer(name, label, found, beside, configs)


def _put(found: Found, name: str, there: RunConfig) -> RunConfig:
    try:
        config = override(there, found.settings)
    except ConfigError as error:
        raise ConfigError(f"settings of {found.name} do not apply to {name}: {error}") from None
    origin = {"sweep": found.name, "dataset": found.config.data.dataset, "settings": dict(found.settings), "on": name}
    return config.model_copy(update={"provenance": json.loads(json.dumps(origin))})
