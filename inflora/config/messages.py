"""Tell a user of a setting that breaks a rule: in one line, however long or strange the given value is."""

import reprlib
import types
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from inflora.errors import one_line

_MOST = 4
"""Broken rules that are told of at once."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
_short.maxlong, _short.maxlevel = 45, 2


def cut(text: object, length: int = 80) -> str:
    """``text`` in one short line."""
    return one_line(str(text), length)


def shown(value: object) -> str:
    """A value as Python writes it, without most of it where it is large."""
    return cut(_short.repr(value), 200)


def listing(names: Iterable[str]) -> str:
    """Names of settings, separated by commas."""
    return cut(", ".join(names), 600)


def explain(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """A pydantic error as one line: which setting, which rule, what was given; unknown names list the known ones.

    ``model`` is what was validated.
    """
    told: dict[tuple[str, str], list[str]] = {}
    broken = error.errors(include_url=False)
    for each in broken[: 2 * _MOST]:
        rule = _explain_one(model, each)
        told.setdefault((rule.path, rule.given), []).append(rule.text)
    lines = [f"{path}{' or '.join(dict.fromkeys(texts))}{given}" for (path, given), texts in told.items()]
    more = [f"and {len(broken) - _MOST} more"] if len(broken) > 2 * _MOST else []
    return " ".join("; ".join([*lines[:_MOST], *more]).split())


class _Rule(NamedTuple):
    """A broken rule. Those of a setting that may be of several kinds have a common ``path`` and ``given``."""

    path: str
    text: str = ""
    given: str = ""


def _explain_one(root: type[BaseModel] | None, error: Any) -> _Rule:
    names, group = _names(root, error["loc"])
    path = cut(".".join(names)) or "config"
    kind, given = error["type"], error["input"]
    if kind == "extra_forbidden":
        known = f"; known here: {listing(group.model_fields)}" if group else ""
        return _Rule(f"unknown setting {path}{known}")
    if kind == "union_tag_not_found":
        return _Rule(f"{path}.{_tag(error)} is missing; known: {_choices(root, names)}")
    if kind == "union_tag_invalid":
        tag = shown(error["ctx"]["tag"])
        return _Rule(f"unknown {path}.{_tag(error)} {tag}; known: {_choices(root, names)}")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return _Rule(f"{path}: ", "must be a mapping of settings", f", got {shown(given)}")
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ").removeprefix("Tuple ")
    message = message.replace("should be", "must be").replace("should have", "must have").replace("valid tuple", "list")
    return _Rule(f"{path}: ", cut(message, 400), "" if isinstance(given, dict) else f", got {shown(given)}")


def _tag(error: Any) -> str:
    return str(error["ctx"]["discriminator"]).strip("'")


def _choices(root: type[BaseModel] | None, names: Sequence[str]) -> str:
    """The names between which a group of settings is chosen, where ``names`` leads to in ``root``."""
    group: type[BaseModel] | None = root
    choices: dict[str, type[BaseModel]] = {}
    for name in names:
        field = group.model_fields.get(name) if group else None
        group, choices = (_model_of(field), groups_of(field)) if field else (None, {})
    return listing(choices)


def groups_of(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """The models that a field chooses from, by the value that tells them apart; empty where it has no such choice."""
    return next((each for each in field.metadata if isinstance(each, dict)), {})


def _names(root: type[BaseModel] | None, location: Sequence[str | int]) -> tuple[list[str], type[BaseModel] | None]:
    """The names of settings in an error's location, and the group that holds the last of them.

    Where a setting may be of several kinds, pydantic puts the kind that it tried after the setting's name.
    """
    names: list[str] = []
    group, parts = root, list(location)
    holder = group
    while parts:
        part = parts.pop(0)
        names.append(str(part))
        holder = group
        field = group.model_fields.get(str(part)) if group else None
        group = _model_of(field) if field else None
        if field is not None and parts and (groups_of(field) or len(alternatives(field.annotation)) > 1):
            tried = str(parts.pop(0))
            by_kind = {each.__name__: each for each in alternatives(field.annotation) if is_model(each)}
            group = (groups_of(field) | by_kind).get(tried)
    return names, holder


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union but for None; the annotation itself where it is no union."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return [annotation]
    return [each for each in get_args(annotation) if each is not type(None)]


def _model_of(field: FieldInfo) -> type[BaseModel] | None:
    kinds = alternatives(field.annotation)
    return kinds[0] if len(kinds) == 1 and is_model(kinds[0]) else None


def is_model(annotation: Any) -> bool:
    """True of an annotation that is a group of settings."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
