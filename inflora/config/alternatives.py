"""Groups of settings between which a run chooses by ``name``: its adapter and its classifier."""

import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Annotated, Any, ClassVar, Union

from pydantic import BeforeValidator, Field, TypeAdapter

from inflora.config.base import Settings
from inflora.config.messages import cut


class Alternative(Settings):
    """One of several groups of settings; ``built_by`` is the class that they describe, as "module:class".

    The class is named and not imported: reading settings must not wait for torch. ``felt_later`` names the settings
    that change nothing before the second task, so that the first task alone cannot choose them.
    """

    name: str
    built_by: ClassVar[str]
    felt_later: ClassVar[frozenset[str]] = frozenset()


def by_name(*models: type[Alternative]) -> dict[str, type[Alternative]]:
    """Name -> settings model, for each of ``models``."""
    return {str(model.model_fields["name"].default): model for model in models}


def add_plugins(known: dict[str, type[Alternative]], group: str) -> None:
    """Add the settings models that installed packages offer by entry points, as ``cosine = "module:CosineSettings"``.

    One that cannot be used is warned of and left out: it must not stop the runs that do not ask for it.
    """
    for point in entry_points(group=group):
        try:
            new = by_name(point.load())
            if taken := new.keys() & known.keys():
                raise ValueError(f"there is {', '.join(taken)} already")
            TypeAdapter(one_of({**known, **new}))  # a choice that cannot be told from the others is found here
        except Exception as error:  # another package's code may raise anything
            warnings.warn(f"{group} {point.name} ({point.value}) cannot be used: {cut(error, 200)}", stacklevel=2)
        else:
            known.update(new)


def one_of(models: Mapping[str, type[Alternative]]) -> Any:
    """The type of a setting that is one of ``models``; a bare name stands for that model's defaults."""
    chosen = Annotated[Union[tuple(models.values())], Field(discriminator="name")]  # type: ignore[valid-type]  # noqa: UP007
    return Annotated[chosen, BeforeValidator(lambda given: {"name": given} if isinstance(given, str) else given)]


def build(settings: Alternative, *arguments: Any) -> Any:
    """The object that ``settings`` describe, of the class that they name."""
    module, _, name = settings.built_by.partition(":")
    return getattr(import_module(module), name)(settings, *arguments)
