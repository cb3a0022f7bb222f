"""A sweep as a value: the fixed settings, the searched ones, the cost it may have."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, ValidationError, model_validator

from inflora.config import (
    ConfigError,
    Count,
    Number,
    RunConfig,
    Seed,
    Settings,
    ShortSeed,
    Whole,
    config_hash,
    explain,
    felt_after_first_task,
    override,
    refuse_old_names,
)
from inflora.errors import one_line
from inflora.files import exists
from sweeps.engine.space import domains
from sweeps.engine.space.domains import Domain
from sweeps.engine.space.objectives import Metric, Objective

SPEC_FILE = "sweep.json"
"""A sweep as it was run, in its folder."""

MOST_ROWS = 100_000
"""Of a grid, whose rows are all kept in memory."""

SelectionProtocol = Literal["end-of-training", "first-task", "two-phase", "current-task"]
"""The data by which settings are chosen, recorded with every result.

- end-of-training: by validation images of all tasks, after the last one;
- first-task: by the first task alone (what only later tasks feel cannot be chosen so);
- two-phase: as end-of-training on one class order, judged (``sweeps final``) on orders that no trial has learnt
  (between datasets, as in arXiv 2403.09066: ``sweeps final SWEEP --on PRESET``);
- current-task: each task by its own validation images right after it was learnt, old ones not looked at again.
"""


Machines = Annotated[Whole, Field(ge=1, le=10_000)]
"""Workers, or a worker's CPUs: more than any cluster's."""
Tries = Annotated[Whole, Field(ge=0, le=1_000)]
Limit = Annotated[Number, Field(gt=0, le=1e6)]
"""Of hours, or gigabytes: a million hours are a century."""
Bound = Annotated[Number, Field(ge=-1e30, le=1e30)]
"""Of a metric."""


class Resources(Settings):
    """The machines that one trial asks the cluster for."""

    workers: Machines = Field(default=1, description="processes of a trial, which share each batch")
    cpus_per_worker: Machines = Field(default=1, description="CPUs that each worker asks for")
    gpus_per_worker: Annotated[Number, Field(ge=0, le=1_000)] = Field(
        default=0, description="GPUs that each worker asks for; a fraction shares one, 0 is the CPU"
    )

    @model_validator(mode="after")
    def _whole_gpus_for_many_workers(self) -> Self:
        if self.workers > 1 and self.gpus_per_worker % 1:
            raise ValueError(
                f"a fraction of a GPU is for one worker: NCCL refuses two on one card, got {self.workers} workers"
            )
        return self

    @property
    def gpus(self) -> float:
        """The GPUs of one trial."""
        return self.workers * self.gpus_per_worker

    def on_device(self, config: RunConfig) -> RunConfig:
        """The config as it is run on these: where no GPU is asked for, ``device`` auto is the CPU.

        Ray shows a machine's GPUs to whoever asks for none, too: all of them would train on the first.
        """
        return config if self.gpus or config.device != "auto" else config.model_copy(update={"device": "cpu"})


class Constraint(Settings):
    """A bound that a trial's metric must keep; a trial that breaks it is never the best."""

    metric: Metric = Field(description="what is bounded")
    at_most: Bound | None = Field(default=None, description="the highest value that may be the best trial's")
    at_least: Bound | None = Field(default=None, description="the lowest; a constraint has one of the two")

    @model_validator(mode="after")
    def _has_a_bound(self) -> Self:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("a constraint has at_most or at_least")
        return self

    @property
    def text(self) -> str:
        """The bound in a word."""
        return (
            f"{self.metric} <= {self.at_most:g}" if self.at_most is not None else f"{self.metric} >= {self.at_least:g}"
        )

    def excess(self, value: float) -> float:
        """The distance of ``value`` beyond the bound (in the metric's unit); 0 or less: kept."""
        return value - self.at_most if self.at_most is not None else (self.at_least or 0.0) - value


class Budget(Settings):
    """When a sweep ends besides by its number of trials. None: never for that reason.

    A sweep that ends by its budget interrupts what runs; with a larger budget the same command goes on with it.
    """

    hours: Limit | None = Field(default=None, description="hours of wall-clock time, over all starts")
    gpu_hours: Limit | None = Field(default=None, description="hours of training of all trials x their GPUs")
    target: Bound | None = Field(default=None, description="a finished trial whose objective is at least this")
    patience: Count | None = Field(default=None, description="trials ended in a row without a new best")
    storage_gb: Limit | None = Field(default=None, description="gigabytes of checkpoints on the storage")
    until_gain: Limit | None = Field(
        default=None, description="an expected gain of the next eight trials below so many points of the objective"
    )


class Sweep(Settings):
    """One search over the settings of one base configuration.

    The paper's settings (``first``) are the first trials; the sampler proposes the rest. With ``tradeoffs`` the search
    looks for the Pareto front of the objective and these; the best trial is still the one with the best objective.
    """

    name: str = Field(
        max_length=100,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="its folder's: letters, digits and _ . - between them",
    )
    base: RunConfig = Field(description="the settings of every trial, where the space does not search them")
    space: dict[str, Domain] = Field(min_length=1, description="setting -> domain; a condition's choice comes first")
    first: tuple[dict[str, JsonValue], ...] = Field(default=(), description="settings that are tried before all others")
    objective: Objective = Field(default="acc/final", description="what names the best trial; more is better")
    tradeoffs: tuple[Metric, ...] = Field(default=(), description="with these the search looks for a Pareto front")
    constraints: tuple[Constraint, ...] = Field(default=(), description="a trial that breaks one is never the best")
    protocol: SelectionProtocol = Field(default="end-of-training", description="the data that choose the settings")
    judge_orders: tuple[Seed, ...] = Field(default=(), description="class orders (seeds) that no trial may learn")
    trials: Count = Field(default=16, description="in all, those already done included")
    budget: Budget = Budget()
    sampler: Literal["gp", "tpe", "cmaes", "random", "grid"] = Field(
        default="gp", description="gp falls back to tpe where some settings hang on others, or with several objectives"
    )
    sampler_seed: ShortSeed = Field(default=0, description="of what the sampler draws")
    grid_points: Annotated[Whole, Field(ge=1, le=1_000)] = Field(
        default=3, description="values per setting that the grid sampler tries"
    )
    early_stopping: Literal["none", "asha", "median", "hyperband"] = Field(
        default="none", description="with samplers that learn from stopped trials too, or from none: tpe, random, grid"
    )
    grace_tasks: Count = Field(default=2, description="tasks that every trial may learn before it can be stopped")
    reduction: Annotated[Whole, Field(ge=2, le=1_000)] = Field(
        default=2, description="1/reduction of the trials pass each rung (asha, hyperband)"
    )
    retries: Tries = Field(
        default=2, description="how often a trial is tried again after failures of one kind, where that can help"
    )
    give_up_after: Annotated[Tries, Field(ge=1)] = Field(
        default=3, description="first trials that all fail alike end the sweep"
    )
    executor: Literal["train", "inline"] = Field(
        default="train", description="train: Ray Train workers; inline: one worker inside the Tune trial, starts faster"
    )
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.executor == "inline" and self.resources.workers > 1:
            raise ValueError(f"executor inline runs one worker, got resources.workers={self.resources.workers}")
        domains.check_order(self.space)
        for settings in self.first:
            if set(settings) != set(domains.active(self.space, settings)):
                exactly = sorted(domains.active(self.space, settings))
                raise ValueError(f"each of first must set exactly {exactly}, got {sorted(settings)}")
        if self.base.data.train_on != "train":
            raise ValueError(
                f"base.data.train_on must be train: trials are judged on the rest, got {self.base.data.train_on}"
            )
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objective and tradeoffs must differ, got {', '.join(self.objectives)}")
        if self.sampler == "grid" and (rows := domains.grid_size(self.space, self.grid_points)) > MOST_ROWS:
            raise ValueError(f"the grid must have at most {MOST_ROWS} rows, got {rows}: lower grid_points")
        if self.sampler == "cmaes" and self.tradeoffs:
            raise ValueError("sampler cmaes has one objective; tpe, gp, random and grid take tradeoffs")
        measured = {*self.objectives, *(constraint.metric for constraint in self.constraints)}
        if "cost/gpu_hours" in measured and not self.resources.gpus_per_worker:
            raise ValueError("cost/gpu_hours is 0 for every trial where resources.gpus_per_worker is 0")
        if self.budget.until_gain is not None and self.tradeoffs:
            raise ValueError("budget.until_gain asks for one objective, got tradeoffs")
        if self.budget.until_gain is not None and self.constraints:
            raise ValueError("budget.until_gain knows no constraints: a trial that breaks one would end the search")
        if self.budget.gpu_hours is not None and not self.resources.gpus_per_worker:
            raise ValueError("budget.gpu_hours is never spent where resources.gpus_per_worker is 0")
        return self

    @model_validator(mode="after")
    def _follows_its_protocol(self) -> Self:
        late = sorted(set(self.space) & felt_after_first_task())
        if self.protocol == "first-task" and late:
            raise ValueError(
                f"protocol first-task cannot choose {', '.join(late)}: the first task's accuracy does not depend on it"
            )
        if self.protocol == "current-task" and self.objective != "acc/current":
            raise ValueError(f"protocol current-task is judged by objective acc/current, got {self.objective}")
        if self.protocol == "two-phase" and not self.judge_orders:
            raise ValueError("protocol two-phase needs judge_orders: class orders that no trial learns")
        if self.base.data.order_seed in self.judge_orders:
            raise ValueError(f"judge_orders must not hold base.data.order_seed, got {self.base.data.order_seed}")
        return self

    @property
    def objectives(self) -> tuple[Metric, ...]:
        """The metrics that the search optimises: the objective, then those it is traded against."""
        return self.objective, *self.tradeoffs

    @property
    def judged_by(self) -> tuple[Metric, ...]:
        """Objectives and constrained metrics, each once, in order."""
        return tuple(dict.fromkeys((*self.objectives, *(constraint.metric for constraint in self.constraints))))

    @property
    def gp_falls_back(self) -> bool:
        """True where sampler gp proposes as tpe does: it knows no conditions, constraints or second objectives."""
        return bool(domains.is_conditional(self.space) or self.tradeoffs or self.constraints)

    @property
    def rung_metric(self) -> str:
        """The metric by which early stopping compares trials at equal numbers of tasks done."""
        return "acc/new" if self.protocol == "current-task" else "acc/seen"

    @property
    def tasks_learnt(self) -> int | None:
        """The number of tasks that a trial learns; None: the whole stream."""
        return 1 if self.protocol == "first-task" else None

    @property
    def study_name(self) -> str:
        """One study per sweep and whatever changes what its numbers mean."""
        # Trials, budget, sampler and resources are not among it: another start may change them and go on.
        meaning = {
            "base": config_hash(self.base),
            "space": {path: domain.model_dump() for path, domain in sorted(self.space.items())},
            "objectives": self.objectives,
            "constraints": [constraint.model_dump() for constraint in self.constraints],
            "protocol": self.protocol,
        }
        return f"{self.name}-{hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()[:8]}"

    def config(self, settings: Mapping[str, Any]) -> RunConfig:
        """The base configuration with a trial's settings."""
        return override(self.base, settings)

    def config_or_none(self, settings: Mapping[str, Any]) -> RunConfig | None:
        """``config``; None of settings that break a rule between several, with which no trial has run."""
        try:
            return self.config(settings)
        except ConfigError:
            return None

    def extreme_configs(self) -> list[RunConfig]:
        """The configs whose acceptance means that every domain's values are: base, first trials, ends of each domain.

        Rules between several settings may still refuse a trial, which then ends before it runs.

        Raises:
            ConfigError: A domain or a first trial that no sampler or run accepts; a sampler that early stopping would
                mislead (here and not when a sweep is read: older ones ran so).
        """
        if self.sampler in ("gp", "cmaes") and self.early_stopping != "none":
            raise ConfigError(
                f"sampler {self.sampler} learns from finished trials only, of which early stopping leaves the lucky "
                f"ones: set early_stopping none, or sampler tpe, random or grid; got early_stopping "
                f"{self.early_stopping}"
            )
        refuse_old_names(self.space)
        for path in self.space:
            if path.split(".")[0] not in ("adapter", "classifier", "optim"):
                raise ConfigError(
                    f"space {path}: only adapter.*, classifier.* and optim.* are searched, data and seeds are fixed"
                )
        for trial in self.first:
            for path, value in trial.items():
                if not self.space[path].contains(value):
                    raise ConfigError(f"first {path}={value} is outside its space: {self.space[path]}")
        settings: list[Mapping[str, Any]] = [{}, *self.first, *domains.extremes(self.space)]
        return [self.config(each) for each in settings]


def read_sweep(folder: Path) -> Sweep:
    """The sweep that was run in ``folder``.

    Raises:
        ConfigError: No sweep is there, or one of another version.
    """
    path = folder / SPEC_FILE
    if not exists(path):
        beside = sorted(p.parent.name for p in folder.parent.glob(f"*/{SPEC_FILE}"))
        known = f"; sweeps in {one_line(str(folder.parent), 300)}: {one_line(', '.join(beside), 300)}" if beside else ""
        raise ConfigError(f"no sweep in {one_line(str(folder), 300)}: {SPEC_FILE} is missing{known}")
    if not path.is_file():
        raise ConfigError(f"{path} is no file")
    try:
        return parse_sweep(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def parse_sweep(content: bytes, shown: str) -> Sweep:
    """The sweep that a file holds; ``shown`` is its name.

    Raises:
        ConfigError: One of another version, or none.
    """
    try:
        return Sweep.model_validate_json(content)
    except ValidationError as error:
        raise ConfigError(f"{shown} is of another version or damaged: {one_line(explain(error), 300)}") from None
