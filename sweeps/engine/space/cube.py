"""Settings as points of the unit cube, and back: how samplers that calculate see a space.

Shapes: M settings, D coordinates, S settings searched.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sweeps.engine.space.domains import Choice, Scalar, Space
from sweeps.engine.space.gaussian_process import Array


def encoded(space: Space, several: Sequence[Mapping[str, Any]]) -> Array:
    """The settings' places (M x D) in the unit cube; a choice has a coordinate for each of its options.

    A setting that does not exist beside others lies in the middle: nothing distinguishes those without it.
    """
    return np.array([[share for path in space for share in _shares(space, path, each)] for each in several], float)


def _shares(space: Space, path: str, settings: Mapping[str, Any]) -> list[float]:
    domain = space[path]
    if isinstance(domain, Choice):
        return [float(path in settings and settings[path] == option) for option in domain.options]
    return [domain.share_of(settings[path]) if path in settings else 0.5]


def settings_at(space: Space, point_S: Array) -> dict[str, Scalar]:
    """The settings at a point that has a coordinate for each of them, also for choices."""
    chosen: dict[str, Scalar] = {}
    for (path, domain), share in zip(space.items(), point_S, strict=True):
        if domain.is_active(chosen):
            chosen[path] = domain.at(float(share))
    return chosen


def point_of(space: Space, settings: Mapping[str, Any]) -> Array:
    """A point (S) whose ``settings_at`` are these."""
    return np.array([_share(space, path, settings) for path in space], dtype=float)


def _share(space: Space, path: str, settings: Mapping[str, Any]) -> float:
    domain = space[path]
    if path not in settings:
        return 0.5
    if isinstance(domain, Choice):
        return (domain.options.index(settings[path]) + 0.5) / len(domain.options)
    return domain.share_of(settings[path])
