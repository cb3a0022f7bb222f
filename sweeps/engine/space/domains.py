"""Domains of settings; some settings are active only where another one was chosen so."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Annotated, Any, Literal

import numpy as np
import optuna
from pydantic import Field

from inflora.config import ConfigError, Flag, Number, Settings, Whole

Scalar = int | float | str | bool | None

_LOW, _HIGH = "the lowest value, possible itself", "the highest value, possible itself"


class Conditional(Settings):
    """The base of every domain: ``when`` names the choices without which the setting is not asked for.

    ``when={"adapter.name": ("inflora",)}`` is a setting that only InfLoRA has; the setting it names is searched before
    it in the space.
    """

    when: dict[str, tuple[Scalar, ...]] = Field(default={}, description="setting -> choices beside which it exists")

    def is_active(self, chosen: Mapping[str, Any]) -> bool:
        """True if the setting exists beside those chosen before it."""
        return all(path in chosen and chosen[path] in options for path, options in self.when.items())

    def transformed(self) -> "Domain":
        """The domain that the sampler sees in its place: itself, unless its scale is one that no sampler knows."""
        return self  # type: ignore[return-value]

    def transform(self, value: Any) -> Any:
        """A value on the sampler's scale."""
        return value

    def inverse_transform(self, value: Any) -> Any:
        """The value that a sampler's value stands for."""
        return value

    def at(self, share: float) -> Scalar:
        """The value at a share (0 to 1) of the way from end to end, on the domain's scale."""
        raise NotImplementedError


class _Bounded(Conditional):
    """Everything between two bounds, both possible."""

    low: Number
    high: Number

    def ends(self) -> tuple[Scalar, ...]:
        """The extreme values: what a run must accept."""
        return self.low, self.high

    def contains(self, value: Any) -> bool:
        """True if the sampler could choose ``value``."""
        return isinstance(value, int | float) and self.low <= value <= self.high

    def share_of(self, value: Any) -> float:
        """Where ``value`` lies on the way from end to end, on the domain's scale: what ``at`` takes back."""
        raise NotImplementedError


class _Range(_Bounded):
    """Everything between two bounds, on a linear scale or a logarithmic one."""

    log: Flag = Field(default=False, description="steps are factors, not differences")

    def _spaced(self, count: int) -> list[float]:
        space = np.geomspace if self.log else np.linspace
        return [float(value) for value in np.clip(space(self.low, self.high, count), self.low, self.high)]

    def _ends(self) -> tuple[float, float]:
        """The ends of the way that ``at`` goes, on the domain's scale."""
        return self._scaled(self.low), self._scaled(self.high)

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.log else float(value)

    def at(self, share: float) -> Scalar:
        """The value at a share (0 to 1) of the way from end to end, on the domain's scale."""
        low, high = self._ends()
        place = low + share * (high - low)
        return min(max(math.exp(place) if self.log else place, self.low), self.high)

    def share_of(self, value: Any) -> float:
        """Where ``value`` lies on the way from end to end, on the domain's scale: what ``at`` takes back."""
        low, high = self._ends()
        return (self._scaled(value) - low) / (high - low) if high > low else 0.5


Place = Annotated[Whole, Field(ge=-(2**53), le=2**53)]
"""Whole numbers that samplers, which calculate with float64, tell apart."""


class Integer(_Range):
    """A whole number between two bounds, both possible."""

    kind: Literal["integer"] = "integer"
    low: Place = Field(description=_LOW)
    high: Place = Field(description=_HIGH)

    def suggest(self, trial: optuna.trial.BaseTrial, path: str) -> Scalar:
        """Let the sampler choose a value for the setting ``path``."""
        return trial.suggest_int(path, self.low, self.high, log=self.log)

    def _ends(self) -> tuple[float, float]:
        # Half a step beyond the bounds: so the outermost numbers have as long a way as the others.
        return self._scaled(self.low - 0.5), self._scaled(self.high + 0.5)

    def at(self, share: float) -> Scalar:
        """The whole number at a share (0 to 1) of the way from end to end, on the domain's scale."""
        return round(float(super().at(share)))  # type: ignore[arg-type]

    def points(self, count: int) -> list[Scalar]:
        """At most ``count`` values from end to end, evenly on the domain's scale."""
        return list(dict.fromkeys(round(value) for value in self._spaced(count)))


class Real(_Range):
    """A number between two bounds."""

    kind: Literal["real"] = "real"
    low: Annotated[Number, Field(ge=-1e30, le=1e30, description=_LOW)]
    high: Annotated[Number, Field(ge=-1e30, le=1e30, description=_HIGH)]

    def suggest(self, trial: optuna.trial.BaseTrial, path: str) -> Scalar:
        """Let the sampler choose a value for the setting ``path``."""
        return trial.suggest_float(path, self.low, self.high, log=self.log)

    def points(self, count: int) -> list[Scalar]:
        """``count`` values from end to end, evenly on the domain's scale."""
        return list(dict.fromkeys(self._spaced(count)))


class NearOne(_Bounded):
    """A share close to 1, where 0.99 and 0.999 differ as much as 0.9 and 0.99: log scale in the complement to 1."""

    kind: Literal["near_one"] = "near_one"
    low: Annotated[Number, Field(ge=0, le=1 - 1e-10, description=_LOW)]
    high: Annotated[Number, Field(ge=1e-10, le=1 - 1e-10, description=_HIGH)]

    def suggest(self, trial: optuna.trial.BaseTrial, path: str) -> Scalar:
        """Let the sampler choose a value for the setting ``path``."""
        return trial.suggest_float(path, self.low, self.high)

    def transformed(self) -> "Domain":
        """Its complement to 1, on a logarithmic scale."""
        return Real(low=_missing(self.high), high=_missing(self.low), log=True, when=self.when)

    def transform(self, value: Any) -> Any:
        """The complement to 1."""
        return _missing(value)

    def inverse_transform(self, value: Any) -> Any:
        """The share; rounding must not leave the bounds."""
        return min(max(_missing(value), self.low), self.high)

    def points(self, count: int) -> list[Scalar]:
        """``count`` values from end to end, evenly on the domain's scale."""
        missing = np.geomspace(_missing(self.low), _missing(self.high), count)
        return list(dict.fromkeys(self.inverse_transform(float(each)) for each in missing))

    def at(self, share: float) -> Scalar:
        """The share at a part (0 to 1) of the way from end to end, on the domain's scale."""
        missing = math.exp(self._log_missing(self.low) * (1 - share) + self._log_missing(self.high) * share)
        return float(self.inverse_transform(missing))

    def share_of(self, value: Any) -> float:
        """Where ``value`` lies on the way from end to end, on the domain's scale: what ``at`` takes back."""
        low, high = self._log_missing(self.low), self._log_missing(self.high)
        return (self._log_missing(value) - low) / (high - low) if high != low else 0.5

    @staticmethod
    def _log_missing(value: float) -> float:
        return math.log(max(_missing(value), 1e-10))


def _missing(share: float) -> float:
    """The complement to 1, free of rounding noise: 0.05 and not 0.050000000000000044."""
    return round(1 - share, 10)


class Choice(Conditional):
    """One of some values."""

    kind: Literal["choice"] = "choice"
    options: tuple[Scalar, ...] = Field(min_length=1, description="the values, in any order")

    def suggest(self, trial: optuna.trial.BaseTrial, path: str) -> Scalar:
        """Let the sampler choose a value for the setting ``path``."""
        return trial.suggest_categorical(path, self.options)

    def ends(self) -> tuple[Scalar, ...]:
        """All values: what a run must accept."""
        return self.options

    def contains(self, value: Any) -> bool:
        """True if the sampler could choose ``value``."""
        return value in self.options

    def points(self, count: int) -> list[Scalar]:
        """All values, however many: they have no order to be thinned out in."""
        return list(self.options)

    def at(self, share: float) -> Scalar:
        """The value at a share (0 to 1) of the options."""
        return self.options[min(int(share * len(self.options)), len(self.options) - 1)]


Domain = Annotated[Integer | Real | NearOne | Choice, Field(discriminator="kind")]
Space = Mapping[str, Domain]
"""Dotted setting -> domain, in the order in which settings are chosen."""


def suggest(space: Space, trial: optuna.trial.BaseTrial) -> dict[str, Scalar]:
    """Settings chosen by the sampler."""
    chosen: dict[str, Scalar] = {}
    for path, domain in space.items():
        if domain.is_active(chosen):
            chosen[path] = domain.suggest(trial, path)
    return chosen


def active(space: Space, settings: Mapping[str, Any]) -> list[str]:
    """The settings that exist where the choices are those of ``settings``."""
    return [path for path, domain in space.items() if domain.is_active(settings)]


def contains(space: Space, settings: Mapping[str, Any]) -> bool:
    """True if the sampler could propose exactly these settings."""
    return set(settings) == set(active(space, settings)) and all(
        space[path].contains(value) for path, value in settings.items()
    )


def grid(space: Space, points: int) -> list[dict[str, Scalar]]:
    """Every combination of at most ``points`` values per setting (all options of a choice)."""
    return list(_combinations(space, lambda domain: domain.points(points)))


def different(space: Space, count: int) -> Iterator[dict[str, Scalar]]:
    """At least ``count`` settings that differ, or all that the space has; each is made when it is asked for."""
    return _combinations(
        space, lambda each: range(each.low, each.high + 1) if isinstance(each, Integer) else each.points(count)
    )


def _combinations(space: Space, values: Callable[[Domain], Sequence[Scalar]]) -> Iterator[dict[str, Scalar]]:
    rows: Iterator[dict[str, Scalar]] = iter([{}])
    for path, domain in space.items():
        rows = _with_each(values(domain), path, domain, rows)
    return rows


def _with_each(
    values: Sequence[Scalar], path: str, domain: Domain, rows: Iterator[dict[str, Scalar]]
) -> Iterator[dict[str, Scalar]]:
    for row in rows:
        yield from ({**row, path: value} for value in values) if domain.is_active(row) else (row,)


def grid_size(space: Space, points: int) -> int:
    """The number of rows that ``grid`` has at most: conditions only make them fewer."""
    return math.prod(len(domain.points(points)) for domain in space.values())


def is_conditional(space: Space) -> bool:
    """True if some settings exist only beside some choices."""
    return any(domain.when for domain in space.values())


def extremes(space: Space) -> Iterator[dict[str, Scalar]]:
    """The ends of every domain, one domain at a time, each beside the choices without which it would not exist.

    Raises:
        ConfigError: A domain that cannot be sampled.
    """
    for path, domain in space.items():
        if not isinstance(domain, Choice) and domain.low > domain.high:
            raise ConfigError(f"space {path}: low must not exceed high, got {domain.low} and {domain.high}")
        yield from ({**choices, path: value} for choices in _enabling(space, path) for value in domain.ends())
    try:
        suggest(space, optuna.create_study(sampler=optuna.samplers.RandomSampler(0)).ask())
    except ValueError as error:
        raise ConfigError(f"the space cannot be sampled: {error}") from None


def check_order(space: Space) -> None:
    """Raise ValueError unless every condition names a choice before it and some of its options."""
    before: dict[str, Domain] = {}
    for path, domain in space.items():
        for parent, options in domain.when.items():
            if not isinstance(before.get(parent), Choice):
                raise ValueError(f"space {path}: when must name choices before it, got {parent}")
            strange = [option for option in options if not before[parent].contains(option)]
            if strange or not options:
                raise ValueError(f"space {path}: {parent} is one of {before[parent].ends()}, got {options}")
        before[path] = domain


def _enabling(space: Space, path: str) -> Iterator[dict[str, Scalar]]:
    """All choices, smallest first, beside which the setting ``path`` exists."""
    when = space[path].when
    for values in product(*when.values()):
        own = dict(zip(when, values, strict=True))
        above = [list(_enabling(space, parent)) for parent in when]
        for combination in product(*above):
            merged = {k: v for choices in combination for k, v in choices.items()} | own
            if all(merged[parent] == value for parent, value in own.items()):
                yield {name: merged[name] for name in space if name in merged}
