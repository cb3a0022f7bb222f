"""From plain values, YAML and ``key=value`` to a checked config, and back."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from inflora.config.base import ConfigError, Settings
from inflora.config.messages import cut, explain, listing, shown
from inflora.config.plain_yaml import YamlError, dump_yaml, read_yaml, read_yaml_file
from inflora.config.renamed import refuse_old_names
from inflora.config.run import RunConfig
from inflora.errors import one_line

S = TypeVar("S", bound=Settings)


def checked(model: type[S], settings: Mapping[str, Any]) -> S:
    """Settings from plain values.

    Raises:
        ConfigError: One line that names every setting that breaks a rule.
    """
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(explain(error, model)) from None


def parse_config(settings: Mapping[str, Any]) -> RunConfig:
    """A checked config from plain values.

    Raises:
        ConfigError: One line that names every setting that breaks a rule.
    """
    refuse_old_names(settings)
    return checked(RunConfig, settings)


def override(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """``config`` with dotted settings replaced, e.g. ``{"adapter.rank": 8}``; everything is checked again.

    A path may name a whole group: ``{"classifier": "ncm"}``. Another ``adapter.name`` or ``classifier.name`` starts
    from its own defaults, wherever it stands among the changes. A config that came from elsewhere remembers what was
    changed in it.

    Raises:
        ConfigError: An unknown path or a value that breaks a rule.
    """
    refuse_old_names(changes)
    settings = config.model_dump()
    provenance = settings["provenance"]
    changed = set(provenance.get("changed", []))
    # A group before what is in it, and its name before the rest: a choice would undo what was set before it.
    for path in sorted(changes, key=lambda path: (path.count("."), not path.endswith(".name"))):
        *groups, name = path.split(".")
        value = changes[path]
        node = settings
        for group in groups:
            if not isinstance(node.get(group), dict):
                raise ConfigError(f"unknown setting {cut(path)}; known here: {listing(node)}")
            node = node[group]
        if path in ("adapter.name", "classifier.name") and value != node.get("name"):
            node.clear()
        if path in ("adapter", "classifier") and isinstance(value, str):
            # The one that is there already keeps its settings; another begins with its own defaults.
            value = node[name] if value == node[name]["name"] else {"name": value}
        changed |= {path} if node.get(name) != value else set()
        node[name] = value
    if changed and provenance and settings["provenance"] is provenance:
        provenance["changed"] = sorted(changed)
    return parse_config(settings)


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """``["adapter.rank=8"]`` as ``{"adapter.rank": 8}``; values are read as YAML.

    Raises:
        ConfigError: What is no assignment, or of no plain value.
    """
    changes = {}
    for assignment in assignments:
        path, separator, value = assignment.partition("=")
        if not separator or not path:
            raise ConfigError(f"a setting is given as key=value, got {shown(assignment)}")
        try:
            changes[path] = read_yaml(value)
        except YamlError as error:
            raise ConfigError(f"{cut(path)}: not a plain YAML value, {shown(value)}: {error}") from None
    return changes


def parse_seeds(text: str, option: str = "--seeds") -> list[int]:
    """``"0,1,2"`` as numbers.

    Raises:
        ConfigError: Anything else, or one of them twice.
    """
    parts = [part.strip() for part in text.split(",")]
    seeds = [int(part) for part in parts if re.fullmatch(r"[0-9]{1,10}", part)]
    if len(seeds) < len(parts) or max(seeds) >= 2**32 or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"{option} must be different whole numbers from 0 to {2**32 - 1}, separated by commas, got "
            f"{one_line(text, 200)!r}"
        )
    return seeds


def parse_duration_s(text: str) -> float:
    """``"90"``, ``"90s"``, ``"30m"`` or ``"8h"`` in seconds.

    Raises:
        ConfigError: Anything else, or no time at all.
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smh]?)", text)
    if match is None or not float(match[1]):
        raise ConfigError(f"a time is given as 90 (seconds), 30m or 8h, got {text!r}")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def load_config(path: Path) -> RunConfig:
    """The config in a YAML file.

    Raises:
        ConfigError: The file is missing, is not YAML, or breaks a rule.
    """
    try:
        settings = read_yaml_file(path)
    except OSError as error:
        raise ConfigError(f"cannot read the config {cut(path, 200)}: {error.strerror}") from None
    except YamlError as error:
        raise ConfigError(f"{cut(path, 200)} is not plain YAML: {error}") from None
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{cut(path, 200)} must hold a mapping of settings, got {type(settings).__name__}")
    return parse_config(settings)


def dump_config(config: RunConfig) -> str:
    """The config as YAML that ``load_config`` reads back to an equal value."""
    return dump_yaml(config.model_dump(mode="json", exclude_defaults=False))
