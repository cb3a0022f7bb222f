"""Searches replayed on a table of learning curves, and the true regret of the setting that each would export.

A replay draws what a sweep leaves to chance: the validation images (from all recorded images, with replacement, the
same for all of its trials), the seed that each setting is trained with, and the sampler's seed. The truth of a setting
is its mean accuracy over all recorded images and seeds, smoothed over the space: no replay has seen it.
Settings of the table stand for all of the space: a sampler that proposes another one is given the nearest that it has
not tried. Shapes: S settings, K seeds, T tasks, I images.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.samplers import GPSampler
from optuna.trial import TrialState
from table_file import Table, read_table
from table_streams import PAPER

from sweeps.engine.ledger.records import Outcome, TrialRecord, best_record
from sweeps.engine.space import domains
from sweeps.engine.space.cube import encoded
from sweeps.engine.space.early_stopping import Rungs
from sweeps.engine.space.estimate import Estimate, estimate
from sweeps.engine.space.gaussian_process import posterior
from sweeps.engine.space.samplers import ask, propose
from sweeps.engine.space.spec import Sweep

Array = NDArray[np.float64]


optuna.logging.set_verbosity(optuna.logging.ERROR)


class Arm(NamedTuple):
    """A way to search: a sampler, a rule of early stopping, how the winner is named, and what is tried first.

    ``changes`` are fields of ``Sweep``; ``first`` are places in the table, tried after the recipe's first setting, the
    paper's. With ``forecasts`` a trial stops when it is not expected to win, and samplers are told what it was
    expected to end with. ``optunas``: Optuna's own Gaussian process proposes.
    """

    changes: Mapping[str, Any] = {}
    winner: str = "estimate"
    first: tuple[int, ...] = ()
    forecasts: bool = False
    optunas: bool = False


RANDOM = Arm({"sampler": "random"}, winner="observed")
ARMS: dict[str, Arm] = {
    "random": RANDOM,
    "random, estimated": RANDOM._replace(winner="estimate"),
    "tpe": Arm({"sampler": "tpe", "trials": 24}, winner="observed"),
    "tpe, estimated": Arm({"sampler": "tpe", "trials": 24}),
    "tpe + asha": Arm({"sampler": "tpe", "trials": 24, "early_stopping": "asha"}, winner="observed"),
    "tpe + asha, estimated": Arm({"sampler": "tpe", "trials": 24, "early_stopping": "asha"}),
    "optuna's gp": Arm(optunas=True),
    "gp": Arm({"sampler": "gp"}),
    "gp + asha": Arm({"sampler": "gp", "early_stopping": "asha"}),
    "gp + late asha": Arm({"sampler": "gp", "early_stopping": "asha", "grace_tasks": "half"}),
    "gp + forecasts": Arm({"sampler": "gp"}, forecasts=True),
}
"""The ways to search that are compared; the winner is the luckiest trial unless it is "estimated", or of ``gp``."""
DEFAULT = "gp"
"""What a sweep does unless it is told otherwise."""


class Recording(NamedTuple):
    """A table as replays need it.

    ``right_TSKI``: of every task, which images (I of them seen by then, one task after another, of both splits) a
    training got right; ``image_TI``: their places among all images. ``images``: how many are for validation.
    """

    sweep: Sweep
    settings: list[dict[str, Any]]
    points_SD: Array
    right_TSKI: list[NDArray[np.float32]]
    image_TI: list[NDArray[np.int64]]
    images: int
    truth_S: Array

    @property
    def tasks(self) -> int:
        """The number of tasks."""
        return len(self.right_TSKI)


def recording(table: Table) -> Recording:
    """Ready a table for replays.

    Raises:
        ValueError: A setting went astray with every seed.
    """
    sweep = sweep_of(table)
    seeds, count = table.seeds, len(table.settings)
    if lost := [at for at in range(count) if all(table.right["test"][at, seed] is None for seed in seeds)]:
        raise ValueError(f"settings {lost} went astray with every seed: there is no truth of them")
    sizes = [table.facts["images"][split] for split in ("validation", "test")]
    right, places = [], []
    for task in range(table.tasks):
        seen = [sum(size[: task + 1]) for size in sizes]
        places.append(np.concatenate([np.arange(seen[0]), sum(sizes[0]) + np.arange(seen[1])]))
        curve = np.zeros((count, len(seeds), sum(seen)), np.float32)
        for setting in range(count):
            for seed in seeds:
                both = [table.right[split][setting, seed] for split in ("validation", "test")]
                if both[0] is not None and both[1] is not None:
                    curve[setting, seed] = np.concatenate([both[0][task], both[1][task]])
        right.append(curve)
    points_SD = encoded(sweep.space, table.settings)
    means_S = right[-1].mean((1, 2), dtype=np.float64)
    truth_S = smoothed(points_SD, means_S)
    return Recording(sweep, table.settings, points_SD, right, places, sum(sizes[0]), truth_S)


def sweep_of(table: Table) -> Sweep:
    """The search that the table was recorded for."""
    space = table.facts["space"]
    first = [PAPER] if set(space) == set(PAPER) else []
    facts = {"name": "table", "base": table.facts["base"], "space": space, "first": first, "trials": 10_000}
    return Sweep.model_validate(facts)


def smoothed(points_SD: Array, means_S: Array) -> Array:
    """Every setting's score as all settings together tell it: what is left of training seeds is taken off."""
    return posterior(points_SD, means_S).at(points_SD)[0]


class Drawn(NamedTuple):
    """One replay's chances: every setting's accuracy after each task, ``score_ST``."""

    score_ST: Array
    images: int
    seed: int


def drawn(known: Recording, seed: int, images: int | None = None) -> Drawn:
    """Draw validation images, as many as the stream's or so many ``images``, and a training seed for each setting."""
    random = np.random.default_rng(seed)
    count = images or known.images
    everything = len(known.image_TI[-1])
    weight_I = random.multinomial(count, np.full(everything, 1 / everything)).astype(np.float32)
    settings = np.arange(len(known.settings))
    seeds = random.integers(known.right_TSKI[0].shape[1], size=len(settings))
    columns = []
    for right_SKI, image_I in zip(known.right_TSKI, known.image_TI, strict=True):
        weights = weight_I[image_I]
        columns.append(right_SKI[settings, seeds] @ weights / max(weights.sum(), 1))
    return Drawn(np.stack(columns, 1).astype(float), count, seed)


class Point(NamedTuple):
    """Where a search stands after so many ``tasks``: the true regret of what it would export, and what it claims.

    One that exports the luckiest trial claims nothing.
    """

    tasks: int
    regret: float
    claimed: Estimate | None
    truth: float


def replay(known: Recording, arm: Arm, chances: Drawn, budgets: Sequence[int]) -> list[Point]:
    """Search until the last of the ``budgets`` (tasks) is spent; where it stands at each of them.

    A trial that a budget cuts off has not finished.
    """
    half = known.tasks // 2 + 1
    changes = {"sampler_seed": chances.seed, "early_stopping": "none", "first": (), "grace_tasks": 2, **arm.changes}
    changes["grace_tasks"] = half if changes["grace_tasks"] == "half" else changes["grace_tasks"]
    # A copy is not checked: what a sweep refuses, as a sampler that never hears of stopped trials, is compared too.
    search = _Search(known, known.sweep.model_copy(update=changes), arm, [], [], [], {})
    rungs = None if search.sweep.early_stopping == "none" else Rungs(search.sweep, [])
    reached: list[Point] = []
    left, spent = list(budgets), 0
    while left and len(search.records) < len(known.settings):
        row, number = search.next_row(), len(search.records)
        curve_T = chances.score_ST[row]
        outcome, tasks = Outcome.FINISHED, known.tasks
        for done in range(1, known.tasks):
            behind = rungs is not None and rungs.falls_behind(number, done, curve_T[done - 1])
            if behind or (arm.forecasts and search.is_hopeless(number, curve_T[:done])):
                outcome, tasks = Outcome.PRUNED, done
                break
        if rungs is not None:
            rungs.end(number, outcome)
        while left and spent + tasks > left[0]:
            reached.append(search.standing(left.pop(0), chances.images))
        spent += tasks
        search.curves.append(curve_T[:tasks])
        search.records.append(_record(known, number, row, outcome, curve_T[:tasks]))
        while left and spent == left[0]:
            reached.append(search.standing(left.pop(0), chances.images))
    return reached + [search.standing(budget, chances.images) for budget in left]


class _Search(NamedTuple):
    """A replayed search: its trials so far with their curves, and what the stopped ones were expected to end with."""

    known: Recording
    sweep: Sweep
    arm: Arm
    records: list[TrialRecord]
    curves: list[Array]
    trials: list[optuna.trial.FrozenTrial]
    expected: dict[int, float]

    def next_row(self) -> int:
        """The place of the next setting in the table."""
        number, rows = len(self.records), len(self.known.settings)
        first = (rows - 1, *self.arm.first)
        tried = {record.settings["row"] for record in self.records}
        if number < len(first) and first[number] not in tried:
            return first[number]
        free = np.array([row for row in range(rows) if row not in tried])
        if self.sweep.sampler == "random":
            return int(np.random.default_rng((self.sweep.sampler_seed, number, 7)).choice(free))
        for record in self.records[len(self.trials) :]:
            self.trials.append(_trial(self.sweep, record, self.expected.get(record.number)))
        trials = self.trials
        if self.arm.optunas:
            # A seed for each trial, as the product's samplers have: with one for all its first trials would be one.
            (seed,) = np.random.SeedSequence((self.sweep.sampler_seed, number)).generate_state(1).tolist()
            sampler = GPSampler(seed=seed, n_startup_trials=8, warn_independent_sampling=False)
            settings = ask(self.sweep, trials, sampler).settings
        else:
            settings = propose(self.sweep, trials, self.sweep.sampler).settings
        wanted_D = encoded(self.sweep.space, [settings])[0]
        return int(free[((self.known.points_SD[free] - wanted_D) ** 2).sum(1).argmin()])

    def is_hopeless(self, number: int, curve_T: Array) -> bool:
        """Note what a trial with this beginning should end with; True if it hardly ends as the best."""
        finished = [record for record in self.records if record.value is not None]
        done = len(curve_T)
        if len(finished) < _FORECAST_FROM or done < 2:
            return False
        values, ends = (
            np.array([self.curves[record.number][at] for record in finished], float) for at in (done - 1, -1)
        )
        slope = float(np.cov(values, ends)[0, 1] / max(values.var(ddof=1), 1e-9))
        slope = min(max(slope, 0.0), 1.5)
        end = ends.mean() + slope * (curve_T[-1] - values.mean())
        spread = float(np.sqrt(((ends - ends.mean() - slope * (values - values.mean())) ** 2).sum() / (len(ends) - 2)))
        self.expected[number] = float(end)
        return bool(end + _HOPE * spread < np.sort(ends)[-2])

    def standing(self, budget: int, images: int) -> Point:
        """What the search would export now; before any trial has finished the first that it tries."""
        truth_S, claimed, best = self.known.truth_S, None, best_record(self.records)
        if self.arm.winner == "estimate" and (estimates := estimate(self.sweep, self.records, images)):
            best = estimates.best()
            assert best is not None
            claimed = estimates.of(best.settings)
        truth = float(truth_S[-1 if best is None else best.settings["row"]])
        return Point(budget, float(truth_S.max()) - truth, claimed, truth)


_FORECAST_FROM, _HOPE = 6, 1.65
"""Finished trials that a forecast needs, and the standard deviations by which a trial must be behind to be stopped."""


def _record(known: Recording, number: int, row: int, outcome: Outcome, curve_T: Array) -> TrialRecord:
    """A trial as the ledger would have it."""
    value = float(curve_T[-1]) if outcome is Outcome.FINISHED else None
    settings = {**known.settings[row], "row": row}
    values = () if value is None else (value,)
    return TrialRecord(number, settings, outcome, [], value, "", number, number, values)


def _trial(sweep: Sweep, record: TrialRecord, expected: float | None) -> optuna.trial.FrozenTrial:
    """A trial as the study on disk would have it; one that was stopped ends as it was ``expected`` to, if it was."""
    values = list(record.values) or ([expected] if expected is not None else None)
    trial = optuna.trial.create_trial(
        state=TrialState.COMPLETE if values else TrialState.PRUNED,
        params={path: value for path, value in record.settings.items() if path != "row"},
        distributions=_distributions(sweep.model_dump_json(include={"space"})),
        values=values,
    )
    trial.number = record.number
    return trial


@cache
def _distributions(space: str) -> dict[str, optuna.distributions.BaseDistribution]:
    asked = optuna.create_study(sampler=optuna.samplers.RandomSampler(0)).ask()
    domains.suggest(Sweep.model_validate({**json.loads(space), "name": "x", "base": {}}).space, asked)
    return asked.distributions


def portfolio(others: Sequence[Recording], size: int) -> tuple[int, ...]:
    """The settings (places) that are best to try first, as other streams tell: one after another, each the one that
    leaves the least mean regret, in units of the stream's spread, beside those before it and the paper's.
    """
    regret_OS = np.array([(each.truth_S.max() - each.truth_S) / each.truth_S.std() for each in others])
    least_O, chosen = regret_OS[:, -1], []
    for _ in range(size):
        chosen.append(int(np.minimum(least_O[:, None], regret_OS).mean(0).argmin()))
        least_O = np.minimum(least_O, regret_OS[:, chosen[-1]])
    return tuple(chosen)


def near_paper(known: Recording, size: int, distance: float = 0.25) -> tuple[int, ...]:
    """The settings (places) that are about so far from the paper's: a prior around it."""
    apart_S = np.abs(((known.points_SD[:-1] - known.points_SD[-1]) ** 2).sum(1) ** 0.5 - distance)
    return tuple(int(place) for place in np.argsort(apart_S, kind="stable")[:size])


_known: dict[str, Recording] = {}


def known_table(file: Path) -> Recording:
    """A table, read once in a process."""
    if str(file) not in _known:
        _known[str(file)] = recording(read_table(file))
    return _known[str(file)]


class Job(NamedTuple):
    """One replay: its table's file, the arm, the number that its chances are drawn from, and the budgets in tasks."""

    file: Path
    arm: Arm
    number: int
    trials: tuple[int, ...]
    images: int | None = None


def replayed(job: Job) -> list[Point]:
    """One replay; other arms draw the same chances with the same number."""
    known = known_table(job.file)
    budgets = [trials * known.tasks for trials in job.trials]
    return replay(known, job.arm, drawn(known, job.number, job.images), budgets)
