"""Every setting with its type, default, bounds and meaning, as the models say it: for ``inflora settings``."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from inflora.config.adapters import ADAPTERS
from inflora.config.base import ConfigError
from inflora.config.classifiers import CLASSIFIERS
from inflora.config.messages import alternatives, cut, groups_of, is_model, listing
from inflora.config.run import RunConfig


class Setting(NamedTuple):
    """One line of the list; ``choice`` is the adapter or classifier that alone has it, as ``adapter.name=inflora``."""

    path: str
    allowed: str
    default: str
    description: str
    choice: str = ""


def all_settings(name: str | None = None) -> list[Setting]:
    """Every setting of a run, or the settings of one adapter or classifier.

    Raises:
        ConfigError: There is none of that name.
    """
    found = list(settings_of(RunConfig))
    if name is None:
        return found
    known = {**ADAPTERS.with_plugins(), **CLASSIFIERS.with_plugins()}
    found = list(settings_of(RunConfig))
    if name not in known:
        raise ConfigError(f"unknown adapter or classifier {cut(repr(name))}; known: {listing(known)}")
    return [setting for setting in found if setting.choice.endswith(f"={name}")]


def lines_of_settings(name: str | None = None) -> Iterator[str]:
    """The list as text: path, default, bounds, meaning; those of one adapter or classifier under its name."""
    found = all_settings(name)
    widths = [max(len(setting[place]) for setting in found) for place in (0, 2)]
    heading = ""
    for setting in found:
        if setting.choice != heading:
            heading = setting.choice
            models = ADAPTERS if heading.startswith("adapter.") else CLASSIFIERS
            doc = (models[heading.partition("=")[2]].__doc__ or "").split("\n")[0]
            yield f"\n{heading}    {doc}"
        path, allowed, default, description, _ = setting
        meaning = f"  {description}" if description else ""
        yield f"{path:{widths[0]}}  {default:{widths[1]}}  {allowed}{meaning and ';' + meaning[1:]}"


def settings_of(model: type[BaseModel], prefix: str = "", choice: str = "") -> Iterator[Setting]:
    """A model's settings; those of adapters and classifiers come last, so that the common ones stand together."""
    later: list[Setting] = []
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        groups = [each for each in alternatives(field.annotation) if is_model(each)]
        if choices := groups_of(field):
            default = str(field.default.name)
            later.append(Setting(f"{path}.name", listing(choices), default, field.description or ""))
            for chosen, group in choices.items():
                heading = f"{path}.name={chosen}"
                own = [each for each in settings_of(group, f"{path}.", heading) if each.path != f"{path}.name"]
                later += own or [Setting(f"{path}.name", chosen, chosen, "has no settings of its own", heading)]
            continue
        if groups:
            yield from settings_of(groups[0], f"{path}.", choice)
        if not is_model(field.annotation):
            yield Setting(path, _allowed(field), _default(field), field.description or "", choice)
    # The choices themselves before the settings of one of them.
    yield from sorted(later, key=lambda setting: bool(setting.choice))


def _default(field: FieldInfo) -> str:
    default = field.default
    if field.is_required():
        return "required"
    if isinstance(default, BaseModel):
        return "these"
    return default if isinstance(default, str) else json.dumps(default)


def _allowed(field: FieldInfo) -> str:
    """Type and bounds, in words."""
    bounded = TypeAdapter(field.rebuild_annotation()).json_schema()
    kinds = bounded.get("anyOf", [bounded])
    return " or ".join(dict.fromkeys(_in_words(kind) for kind in kinds))


_WORDS = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "null": "null"}


def _in_words(kind: dict[str, Any]) -> str:
    """One kind of value, from its JSON schema."""
    if "enum" in kind or "const" in kind:
        return ", ".join(map(str, kind.get("enum", [kind.get("const")])))
    if "$ref" in kind:
        return "the settings above"
    if kind.get("format") == "path":
        return "file"
    if kind.get("type") == "array":
        items = kind.get("prefixItems") or [kind.get("items", {})]
        if "$ref" in items[0]:
            return f"list of {items[0]['$ref'].rpartition('/')[2]}"
        return f"list of {len(items) if 'prefixItems' in kind else ''} {_in_words(items[0])}".replace("  ", " ")
    if kind.get("type") == "object":
        return "mapping"
    return _WORDS.get(str(kind.get("type")), "any value") + _bounds(kind)


def _bounds(kind: dict[str, Any]) -> str:
    low, high = kind.get("minimum", kind.get("exclusiveMinimum")), kind.get("maximum", kind.get("exclusiveMaximum"))
    if low is None or high is None:
        return ""
    above, below = " above" if "exclusiveMinimum" in kind else "", " below" if "exclusiveMaximum" in kind else ""
    return f" from{above} {_short(low)} to{below} {_short(high)}"


def _short(number: float) -> str:
    if isinstance(number, int) and number.bit_count() == 1 and abs(number) > 2**20:
        return f"{'-' * (number < 0)}2^{number.bit_length() - 1}"
    return str(number) if isinstance(number, int) and number < 10**6 else f"{number:g}"
