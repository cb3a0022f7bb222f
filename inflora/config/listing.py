"""Every setting with its type, default, bounds and meaning, as the models say it: for ``inflora settings``."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from inflora.config.base import ConfigError
from inflora.config.messages import alternatives, cut, groups_of, is_model, listing
from inflora.config.run import RunConfig


class Setting(NamedTuple):
    """One line of the list; ``method`` is the method that alone has it."""

    path: str
    allowed: str
    default: str
    description: str
    method: str = ""


def all_settings(method: str | None = None) -> list[Setting]:
    """Every setting of a run, or the settings of one method.

    Raises:
        ConfigError: There is no such method.
    """
    methods = groups_of(RunConfig.model_fields["method"])
    if method is None:
        return list(_settings(RunConfig))
    if method not in methods:
        raise ConfigError(f"unknown method {cut(repr(method))}; known: {listing(methods)}")
    return [setting for setting in _settings(RunConfig) if setting.method == method]


def lines_of_settings(method: str | None = None) -> Iterator[str]:
    """The list as text: path, default, what is allowed, meaning; the methods' own under their names."""
    found = all_settings(method)
    widths = [max(len(setting[place]) for setting in found) for place in (0, 2)]
    heading = ""
    for setting in found:
        if setting.method != heading:
            heading = setting.method
            doc = (groups_of(RunConfig.model_fields["method"])[heading].__doc__ or "").split("\n")[0]
            yield f"\nmethod.name={heading}    {doc}"
        path, allowed, default, description, _ = setting
        meaning = f"  {description}" if description else ""
        yield f"{path:{widths[0]}}  {default:{widths[1]}}  {allowed}{meaning and ';' + meaning[1:]}"


def _settings(model: type[BaseModel], prefix: str = "", method: str = "") -> Iterator[Setting]:
    """Those of all methods come last, so that what is common to all stands together."""
    later: list[Setting] = []
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        groups = [each for each in alternatives(field.annotation) if is_model(each)]
        if choices := groups_of(field):
            later += [Setting(f"{path}.name", listing(choices), str(field.default.name), "which method learns", "")]
            for choice, group in choices.items():
                own = [each for each in _settings(group, f"{path}.", choice) if each.path != f"{path}.name"]
                later += own or [Setting(f"{path}.name", choice, choice, "has no settings of its own", choice)]
            continue
        if groups:
            yield from _settings(groups[0], f"{path}.", method)
        if not is_model(field.annotation):
            yield Setting(path, _allowed(field), _default(field), field.description or "", method)
    yield from later


def _default(field: FieldInfo) -> str:
    default = field.default
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
    if isinstance(number, int) and number.bit_count() == 1 and number > 2**20:
        return f"2^{number.bit_length() - 1}"
    return str(number) if isinstance(number, int) and number < 10**6 else f"{number:g}"
