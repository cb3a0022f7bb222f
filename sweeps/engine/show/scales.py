"""Where a setting's values lie on a picture: on its domain's own scale, from 0 to 1, with round numbers beside it."""

import math
from collections.abc import Iterator

import numpy as np

from sweeps.engine.space.domains import Choice, Domain, NearOne, Scalar

_MOST_TICKS = 5


def places(domain: Domain, count: int) -> list[float]:
    """Places from end to end, ``count`` of them or, of a choice, one for every option."""
    if isinstance(domain, Choice):
        return [(at + 0.5) / len(domain.options) for at in range(len(domain.options))]
    return np.linspace(0, 1, count).tolist() if domain.high > domain.low else [0.5]


def place(domain: Domain, value: Scalar, number: int = 0) -> float:
    """The place of a value; trials with one option stand side by side, in the order of their ``number``."""
    if not isinstance(domain, Choice):
        return domain.share_of(value)
    beside = (number * 0.618) % 1 - 0.5
    return (domain.options.index(value) + 0.5 + 0.6 * beside) / len(domain.options)


def ticks(domain: Domain) -> dict[float, str]:
    """Place -> the round number there, or the option."""
    if isinstance(domain, Choice):
        return dict(zip(places(domain, 0), map(str, domain.options), strict=True))
    if domain.low >= domain.high:
        return {0.5: f"{domain.low:.4g}"}
    if isinstance(domain, NearOne):
        values = [1 - each for each in _powers(1 - domain.high, 1 - domain.low)]
    elif domain.log:
        values = list(_powers(domain.low, domain.high))
    else:
        values = list(_steps(domain.low, domain.high))
    values = [value for value in values if domain.low <= value <= domain.high] or [domain.low, domain.high]
    return {domain.share_of(value): f"{value:.4g}" for value in values}


def _powers(low: float, high: float) -> Iterator[float]:
    """Round numbers on a logarithmic scale: 1, 2, 5 times powers of ten, or fewer where these are many."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for firsts in ((1, 2, 5), (1, 3), (1,)):
        found = [
            first * 10.0**power
            for power in exponents
            for first in firsts
            if low <= first * 10.0**power <= high * 1.0000001
        ]
        if len(found) <= _MOST_TICKS:
            break
    yield from (float(f"{each:.4g}") for each in found[:: -(-len(found) // _MOST_TICKS)])


def _steps(low: float, high: float) -> Iterator[float]:
    """Round numbers on a linear scale."""
    rough = (high - low) / (_MOST_TICKS - 1)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * each for each in (1, 2, 5, 10) if unit * each >= rough)
    first = math.ceil(low / step)
    yield from (float(f"{at * step:.6g}") for at in range(first, math.floor(high / step * 1.0000001) + 1))
