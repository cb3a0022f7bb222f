"""A sweep as a value: what is fixed, what is searched, what it may cost."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import optuna
from pydantic import Field, JsonValue, ValidationError, model_validator

from inflora.config import ConfigError, RunConfig, Settings, config_hash, override

SPEC_FILE = "sweep.json"
"""A sweep as it was run, in its folder."""

Scalar = int | float | str | bool | None


class SearchedByName(Settings):
    """What the sampler searches under the setting's own name, as the setting's own value."""

    def fix(self, path: str, value: Any) -> dict[str, Any]:
        """The sampler's parameters that make the setting ``value``."""
        return {path: value}


class Integer(SearchedByName):
    """A whole number between two bounds, both possible."""

    kind: Literal["integer"] = "integer"
    low: int
    high: int
    log: bool = False

    def suggest(self, trial: optuna.trial.BaseTrial, path: str) -> Scalar:
        """Let the sampler choose a value for the setting ``path``."""
        return trial.suggest_int(path, self.low, self.high, log=self.log)


class Real(SearchedByName):
    """A number between two bounds."""

    kind: Literal["real"] = "real"
    low: float
    high: float
    log: bool = False

    def suggest(self, trial: optuna.trial.BaseTrial, path: str) -> Scalar:
        """Let the sampler choose a value for the setting ``path``."""
        return trial.suggest_float(path, self.low, self.high, log=self.log)


class NearOne(Settings):
    """A share close to 1, where 0.99 and 0.999 differ as much as 0.9 and 0.99: log scale in what is missing to 1.

    The sampler searches ``1 - setting`` under that very name; the setting itself is what is recorded.
    """

    kind: Literal["near_one"] = "near_one"
    low: float = Field(ge=0, lt=1)
    high: float = Field(gt=0, lt=1)

    def suggest(self, trial: optuna.trial.BaseTrial, path: str) -> Scalar:
        """Let the sampler choose a value for the setting ``path``."""
        missing = trial.suggest_float(f"1 - {path}", _missing(self.high), _missing(self.low), log=True)
        return _missing(missing)

    def fix(self, path: str, value: Any) -> dict[str, Any]:
        """The sampler's parameters that make the setting ``value``."""
        return {f"1 - {path}": _missing(value)}


def _missing(share: float) -> float:
    """What is missing to 1, free of rounding noise: 0.05 and not 0.050000000000000044."""
    return round(1 - share, 10)


class Choice(SearchedByName):
    """One of some values."""

    kind: Literal["choice"] = "choice"
    options: tuple[Scalar, ...] = Field(min_length=1)

    def suggest(self, trial: optuna.trial.BaseTrial, path: str) -> Scalar:
        """Let the sampler choose a value for the setting ``path``."""
        return trial.suggest_categorical(path, self.options)


Domain = Annotated[Integer | Real | NearOne | Choice, Field(discriminator="kind")]


class Resources(Settings):
    """What one trial asks the cluster for."""

    workers: int = Field(default=1, ge=1)
    cpus_per_worker: int = Field(default=1, ge=1)
    gpus_per_worker: float = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _whole_gpus_for_many_workers(self) -> Self:
        if self.workers > 1 and self.gpus_per_worker % 1:
            raise ValueError(
                f"a fraction of a GPU is for one worker: NCCL refuses two on one card, got {self.workers} workers"
            )
        return self


class Sweep(Settings):
    """One search over the settings of one base configuration.

    The paper's settings (``first``) are the first trials; the sampler proposes the rest.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    base: RunConfig
    space: dict[str, Domain] = Field(min_length=1)
    first: tuple[dict[str, JsonValue], ...] = ()
    objective: Literal["acc/final", "acc/avg_incremental", "bwt"] = "acc/final"
    trials: int = Field(default=16, ge=1)
    sampler_seed: int = Field(default=0, ge=0)
    grace_tasks: int = Field(default=2, ge=1, description="tasks that every trial may learn before it can be stopped")
    reduction: int = Field(default=2, ge=2, description="1/reduction of the trials pass each rung of ASHA")
    executor: Literal["train", "inline"] = Field(
        default="train", description="train: Ray Train workers; inline: one worker inside the Tune trial, starts faster"
    )
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.executor == "inline" and self.resources.workers > 1:
            raise ValueError(f"executor inline runs one worker, got resources.workers={self.resources.workers}")
        for settings in self.first:
            if set(settings) != set(self.space):
                raise ValueError(f"each of first must set exactly {sorted(self.space)}, got {sorted(settings)}")
        if self.base.data.train_on != "train":
            raise ValueError(
                f"base.data.train_on must be train: trials are judged on the rest, got {self.base.data.train_on}"
            )
        return self

    @property
    def study_name(self) -> str:
        """One study per sweep and whatever changes what its numbers mean."""
        meaning = {
            "base": config_hash(self.base),
            "space": {path: domain.model_dump() for path, domain in sorted(self.space.items())},
            "objective": self.objective,
        }
        return f"{self.name}-{hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()[:8]}"

    def config(self, settings: Mapping[str, Any]) -> RunConfig:
        """The base configuration with a trial's settings."""
        return override(self.base, settings)

    def suggest(self, trial: optuna.trial.BaseTrial) -> dict[str, Scalar]:
        """Dotted settings chosen by the sampler."""
        return {path: domain.suggest(trial, path) for path, domain in self.space.items()}

    def corners(self) -> list[RunConfig]:
        """The configs whose acceptance means that every trial's is accepted: base, first trials, ends of each domain.

        Raises:
            ConfigError: A domain or a first trial that no sampler or run accepts.
        """
        settings: list[Mapping[str, Any]] = [{}, *self.first]
        for path, domain in self.space.items():
            if path.split(".")[0] not in ("method", "optim"):
                raise ConfigError(f"space {path}: only method.* and optim.* are searched, data and seeds are fixed")
            settings += [{path: value} for value in _ends(path, domain)]
        for trial in self.first:
            for path, value in trial.items():
                if not _contains(self.space[path], value):
                    raise ConfigError(f"first {path}={value} is outside its space: {self.space[path]}")
        try:
            self.suggest(optuna.create_study(sampler=optuna.samplers.RandomSampler(0)).ask())
        except ValueError as error:
            raise ConfigError(f"the space cannot be sampled: {error}") from None
        return [self.config(each) for each in settings]


def read_sweep(folder: Path) -> Sweep:
    """The sweep that was run in ``folder``.

    Raises:
        ConfigError: No sweep is there, or one of another version.
    """
    path = folder / SPEC_FILE
    try:
        return Sweep.model_validate_json(path.read_text())
    except OSError:
        beside = sorted(p.parent.name for p in folder.parent.glob(f"*/{SPEC_FILE}"))
        known = f"; sweeps in {folder.parent}: {', '.join(beside)}" if beside else ""
        raise ConfigError(f"no sweep in {folder}: {SPEC_FILE} is missing{known}") from None
    except ValidationError as error:
        raise ConfigError(f"{path} is of another version or damaged: {error.errors()[0]['msg']}") from None


def _ends(path: str, domain: Domain) -> tuple[Scalar, ...]:
    if isinstance(domain, Choice):
        return domain.options
    if domain.low > domain.high:
        raise ConfigError(f"space {path}: low must not exceed high, got {domain.low} and {domain.high}")
    return domain.low, domain.high


def _contains(domain: Domain, value: Any) -> bool:
    if isinstance(domain, Choice):
        return value in domain.options
    return bool(domain.low <= value <= domain.high)
