"""Groups of settings between which a run chooses by ``name``: its adapter and its classifier."""

import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Annotated, Any, ClassVar, Union

from pydantic import BeforeValidator, Field

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


def plugins(group: str) -> dict[str, type[Alternative]]:
    """The settings models that installed packages add by entry points: ``cosine = "their_module:CosineSettings"``.

    One that cannot be loaded is warned of and left out: it must not stop the runs that do not ask for it.
    """
    models = []
    for point in entry_points(group=group):
        try:
            models.append(point.load())
        except Exception as error:  # another package's code may raise anything
            warnings.warn(f"{group} {point.name} ({point.value}) cannot be loaded: {cut(error, 200)}", stacklevel=2)
    return by_name(*models)


def one_of(models: Mapping[str, type[Alternative]]) -> Any:
    """The type of a setting that is one of ``models``; a bare name stands for that model's defaults."""
    chosen = Annotated[Union[tuple(models.values())], Field(discriminator="name")]  # type: ignore[valid-type]  # noqa: UP007
    return Annotated[chosen, BeforeValidator(lambda given: {"name": given} if isinstance(given, str) else given)]


def build(settings: Alternative, *arguments: Any) -> Any:
    """The object that ``settings`` describe, of the class that they name."""
    module, _, name = settings.built_by.partition(":")
    return getattr(import_module(module), name)(settings, *arguments)
