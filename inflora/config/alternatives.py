"""Groups of settings between which a run chooses by ``name``: its adapter and its classifier."""

import warnings
from importlib import import_module
from importlib.metadata import entry_points
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, SerializeAsAny, ValidationError
from pydantic_core import PydanticCustomError, PydanticKnownError

from inflora.config.base import ConfigError, Settings
from inflora.config.messages import cut


class Alternative(Settings):
    """One of several groups of settings; ``built_by`` is the class that they describe, as "module:class".

    The class is named and not imported: reading settings must not wait for torch. ``felt_later`` names the settings
    that change nothing before the second task, so that the first task alone cannot choose them.
    """

    name: str
    built_by: ClassVar[str]
    felt_later: ClassVar[frozenset[str]] = frozenset()


class Alternatives(dict[str, type[Alternative]]):
    """Name -> settings model: those known here, and those that installed packages add by entry points of ``group``.

    A package adds one as ``cosine = "module:CosineSettings"``. Plug-ins are looked for when a name is unknown, and not
    before: they may import anything of ours.
    """

    def __init__(self, group: str, *models: type[Alternative]) -> None:
        super().__init__({_name(model): model for model in models})
        self.group, self._has_plugins = group, False

    def with_plugins(self) -> "Alternatives":
        """Look for plug-ins, once. One that cannot be used is warned of: it must not stop other runs."""
        points, self._has_plugins = () if self._has_plugins else entry_points(group=self.group), True
        for point in points:
            try:
                model = point.load()
                if not issubclass(model, Alternative) or ":" not in model.built_by:
                    raise TypeError("it is no Alternative with built_by = 'module:class'")
                if self.setdefault(_name(model), model) is not model:
                    raise ValueError(f"there is {_name(model)} already")
            except Exception as error:  # another package's code may raise anything
                told = f"{self.group} {point.name} ({point.value}) cannot be used: {cut(error, 200)}"
                warnings.warn(told, stacklevel=2)
        return self

    def validated(self, given: Any) -> Any:
        """The alternative that ``given`` describes; a bare name stands for that one's defaults."""
        settings = {"name": given} if isinstance(given, str) else given
        if not isinstance(settings, dict):
            return given
        name = settings.get("name")
        if name is None:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": "'name'"})
        if not isinstance(name, str) or (name not in self and name not in self.with_plugins()):
            # An unpaired surrogate is no text for pydantic.
            tag = str(name).encode(errors="replace").decode()
            context = {"discriminator": "'name'", "tag": tag, "expected_tags": ", ".join(self)}
            raise PydanticKnownError("union_tag_invalid", context)
        try:
            return self[name].model_validate(settings)
        except ValidationError as error:
            # With the name in the place of the setting, so that a message can list the settings that are known there.
            broken: list[Any] = [
                {"type": PydanticCustomError(e["type"], e["msg"]), "loc": (name, *e["loc"]), "input": e["input"]}
                for e in error.errors()
            ]
            raise ValidationError.from_exception_data(error.title, broken) from None


def _name(model: type[Alternative]) -> str:
    return str(model.model_fields["name"].default)


def one_of(models: Alternatives) -> Any:
    """The type of a setting that is one of ``models``."""
    return Annotated[SerializeAsAny[Alternative], BeforeValidator(models.validated), models]


def build(settings: Alternative, *arguments: Any) -> Any:
    """The object that ``settings`` describe, of the class that they name.

    Raises:
        ConfigError: There is no such class, or it is not whole: a plug-in's.
    """
    module, _, name = settings.built_by.partition(":")
    try:
        return getattr(import_module(module), name)(settings, *arguments)
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(f"{settings.name} cannot be built of {settings.built_by}: {cut(error, 200)}") from error
