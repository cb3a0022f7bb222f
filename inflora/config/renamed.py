"""Settings of the form before adapters and classifiers were two choices: refused with their new names."""

from collections.abc import Iterator, Mapping
from typing import Any

from inflora.config.base import ConfigError
from inflora.config.messages import cut
from inflora.config.methods import METHODS

_ALIGNMENT = "method.classifier_alignment"
_FILES = {"data.order": "replay.orders", "optim.head_init": "replay.heads", f"{_ALIGNMENT}.draws": "replay.draws"}
_STILL_SETTINGS = ("data.order", "optim.head_init")
"""Of these, which name no file any more."""
_FIRST = 8  # more are not told of in one line


def refuse_old_names(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError with the new names where ``settings`` (a whole config, or dotted paths) are of the old form."""
    renamed = [f"{old} is now {new}" for old, new in _renamed(_without_idle_alignment(settings))]
    if renamed:
        more = f"; and {len(renamed) - _FIRST} more" if len(renamed) > _FIRST else ""
        raise ConfigError(f"old names of settings: {'; '.join(renamed[:_FIRST])}{more}")


def _without_idle_alignment(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """An old config with its method's name told with its alignment; one of no epochs was none."""
    method = settings.get("method")
    alignment = method.get("classifier_alignment") if isinstance(method, Mapping) else None
    if not isinstance(method, Mapping) or not isinstance(alignment, Mapping | None):
        return settings
    rest = {name: value for name, value in method.items() if name != "classifier_alignment"}
    if not alignment or not alignment.get("epochs", True):
        return {**settings, "method": rest}
    aligned = {"name": "inflora-ca"} if method.get("name") == "inflora" else {}
    return {**settings, "method": {**rest, **aligned, "classifier_alignment": alignment}}


def _renamed(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        path = f"{prefix}{name}"
        if path == "method.name" or (path == "method" and isinstance(value, str)):
            pair = METHODS.get(str(value), {"adapter.name": "...", "classifier.name": "..."})
            yield path, " ".join(f"{new}={str(given).lower()}" for new, given in pair.items())
        elif isinstance(value, Mapping) and value:
            yield from _renamed(value, f"{path}.")
        elif path in _FILES and (path not in _STILL_SETTINGS or str(value).endswith(".safetensors")):
            yield path, _FILES[path]
        elif path == _ALIGNMENT or path.startswith(f"{_ALIGNMENT}."):
            yield path, f"classifier{cut(path.removeprefix(_ALIGNMENT))} of classifier.name=aligned"
        elif path.split(".")[0] == "method":
            yield path, f"adapter.{cut(path.removeprefix('method.'))}" if "." in path else "adapter and classifier"
