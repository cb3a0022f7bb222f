"""The identity of a run's settings: what runs must have in common to be the same."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from inflora.config.run import RunConfig
from inflora.files import require_regular

# What may differ between two machines that do the same run; files count by what is in them.
_NOT_IDENTITY = {"data": {"root"}, "device": True, "provenance": True, "backbone": {"weights"}}

# Settings that came later, with the value that leaves a run as it was before: so states and studies go on.
_CAME_LATER = {"adapter": {"balance": None}}


def config_hash(config: RunConfig) -> str:
    """A hash of a run's settings; places, device and provenance do not count, given files do by their contents.

    The backbone's weights have a hash of their own, of their tensors, wherever they come from.
    The files are read, unless they are as they were when they were last read. One that cannot be read counts by its
    name, and the run that needs it is refused.
    """
    settings = config.model_dump(mode="json", exclude=_NOT_IDENTITY)  # type: ignore[arg-type]
    for group, added in _CAME_LATER.items():
        settings[group] = {name: value for name, value in settings[group].items() if added.get(name, ...) != value}
    if contents := given_contents(config):
        settings["contents"] = contents
    for path in contents:
        _leave_out(settings, path.split("."))
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def given_contents(config: RunConfig) -> dict[str, str]:
    """Dotted setting -> hash of the content, of the files that the config names, where they are there."""
    named = {path: file for path, file in _files(config.model_dump()).items() if path != "backbone.weights"}
    found = {path: _content(file) for path, file in named.items()}
    return {path: content for path, content in found.items() if content is not None}


def _files(settings: dict[str, Any], prefix: str = "") -> dict[str, Path]:
    files: dict[str, Path] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            files |= _files(value, f"{prefix}{name}.")
        elif isinstance(value, Path):
            files[prefix + name] = value
    return files


def _leave_out(settings: dict[str, Any], path: list[str]) -> None:
    *groups, name = path
    for group in groups:
        settings = settings[group]
    settings.pop(name, None)


def _content(file: Path) -> str | None:
    try:
        require_regular(file)
        at = file.stat()
        return _hash_of(file.absolute(), at.st_ino, at.st_size, at.st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=64)
def _hash_of(file: Path, *as_it_was: int) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
