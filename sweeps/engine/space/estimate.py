"""The estimate of a sweep's scores: what its finished trials together say of each of them, and of any other setting.

A trial's own score is one noisy look, and the best of many flatters itself; its neighbours in the space know better.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from sweeps.engine.ledger.records import BestBy, Outcome, TrialRecord, best_first, ranking
from sweeps.engine.space.acquisition import imagined_gain
from sweeps.engine.space.cube import encoded
from sweeps.engine.space.gaussian_process import Array, Posterior, posterior
from sweeps.engine.space.spec import Sweep

_WITHIN = 1.96
"""Standard deviations from the middle of a normal distribution to the bounds of its central 95 %."""
HIGHEST = 1.0
"""No objective is above it: they are shares of images, and differences of shares."""
_LOOKS = 200
"""The finished trials that an estimate is made from, at most: its time grows with their cube."""
NEXT = 8
"""The trials ahead of which it is asked what they would add."""
ENOUGH = 8
"""Finished trials below which that is asked of nobody: there is little but the prior to tell it."""


class Estimate(NamedTuple):
    """What is believed of a score: its mean, and the bounds between which it lies in 95 of 100 cases."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """As a cell shows it: the bounds lie at the same distance, but where no score can be."""
        return f"{self.mean:.4f} \u00b1 {self.mean - self.low:.4f}"


class Estimates(NamedTuple):
    """What a sweep's finished trials say of every setting's objective.

    ``images``: the validation images that all trials were judged on; as they are the same for all, their luck is in
    every estimate and shows in no difference between trials. None where it is not known: the interval lacks it.
    """

    sweep: Sweep
    finished: tuple[TrialRecord, ...]
    posterior: Posterior
    images: int | None

    def of(self, settings: Mapping[str, Any]) -> Estimate:
        """The estimate of a setting, tried or not."""
        return self.of_all([settings])[0]

    def of_all(self, several: Sequence[Mapping[str, Any]]) -> list[Estimate]:
        """The estimates of several settings."""
        with threadpool_limits(1):  # the matrices are small: threads of a busy machine would wait for each other
            mean_M, sd_M = self.posterior.at(encoded(self.sweep.space, several))
        share_M = np.clip(mean_M, 0, 1)
        luck_M = share_M * (1 - share_M) / self.images if self.images else np.zeros_like(mean_M)
        half_M = _WITHIN * np.sqrt(sd_M**2 + luck_M)
        bounds = ((float(m), float(m - h), float(m + h)) for m, h in zip(mean_M, half_M, strict=True))
        return [Estimate(min(mean, HIGHEST), low, min(high, HIGHEST)) for mean, low, high in bounds]

    def of_trials(self) -> dict[int, Estimate]:
        """Trial number -> estimate, of all finished trials."""
        estimates = self.of_all([record.settings for record in self.finished])
        return {record.number: each for record, each in zip(self.finished, estimates, strict=True)}

    def ranking(self) -> list[TrialRecord]:
        """Finished trials that keep all constraints, the best estimate first."""
        known = self.of_trials()
        return sorted(ranking(self.finished), key=lambda record: (-known[record.number].mean, record.number))

    def best(self) -> TrialRecord | None:
        """The finished trial that keeps all constraints and has the best estimate: the setting to train."""
        return next(iter(self.ranking()), None)

    def difference(self, settings: Mapping[str, Any], other: Mapping[str, Any]) -> Estimate:
        """By how much a setting's score exceeds another's: the luck of images that they share is not in it."""
        both_2D = encoded(self.sweep.space, [settings, other])
        mean = float(np.subtract(*self.posterior.at(both_2D)[0]))
        (own, shared), (_, others) = self.posterior.covariance(both_2D, both_2D)
        half = float(_WITHIN * np.sqrt(max(0.0, own + others - 2 * shared)))
        return Estimate(mean, mean - half, mean + half)

    def expected_gain(self, trials: int = NEXT) -> float:
        """What the next ``trials`` are expected to add to the score of the setting to train, in the objective's unit.

        They are imagined where they would be proposed, with results drawn from the posterior: the mean of the best
        estimate after them, less the best one now (the knowledge gradient of a batch; Wu and Frazier, 2016).
        """
        return _gain(_Looks(self.sweep, self.finished), trials)


class _Looks(NamedTuple):
    """What an estimate is made from; of the same question the answer is remembered until a trial has finished."""

    sweep: Sweep
    finished: tuple[TrialRecord, ...]

    def __hash__(self) -> int:
        return hash((self.sweep.name, len(self.finished)))


def estimate(sweep: Sweep, records: Sequence[TrialRecord], images: int | None = None) -> Estimates | None:
    """What all finished trials of a sweep say; None while there is none.

    None too with tradeoffs: a front has no winner that could flatter itself.
    """
    finished = [record for record in records if record.outcome is Outcome.FINISHED and record.value is not None]
    if sweep.tradeoffs or not finished:
        return None
    looks = _Looks(sweep, tuple(sorted(finished, key=lambda record: record.number)))
    return Estimates(sweep, looks.finished, _posterior(looks), images)


def winner(
    records: Sequence[TrialRecord], known: Estimates | None, best_by: BestBy = BestBy.ESTIMATE
) -> TrialRecord | None:
    """The trial whose setting is the one to train; without estimates, with tradeoffs say, that of the best score."""
    return next(iter(winners(records, None if best_by is BestBy.OBSERVED else known)), None)


def winners(records: Sequence[TrialRecord], known: Estimates | None) -> list[TrialRecord]:
    """Finished trials that keep all constraints, the one to train first: the best estimate, else the best score."""
    return ranking(records) if known is None else known.ranking()


def best_estimated_first(records: Sequence[TrialRecord], known: Estimates | None) -> list[TrialRecord]:
    """All trials as tables list them: the best estimate first, those without one last."""
    if known is None:
        return best_first(records)
    told = known.of_trials()
    return sorted(
        records, key=lambda r: (r.number not in told, -told[r.number].mean if r.number in told else 0, r.number)
    )


@lru_cache(maxsize=2)
def _posterior(looks: _Looks) -> Posterior:
    sweep, chosen = looks.sweep, looks.finished
    with threadpool_limits(1):
        if len(chosen) > _LOOKS:
            chosen = tuple(_most_telling(sweep, chosen))
        return posterior(encoded_records(sweep, chosen), _scores(chosen))


@lru_cache(maxsize=2)
def _gain(looks: _Looks, trials: int) -> float:
    known, tried_ND = _posterior(looks), encoded_records(looks.sweep, looks.finished)
    with threadpool_limits(1):
        return imagined_gain(looks.sweep.space, known, tried_ND, trials, HIGHEST)


def _most_telling(sweep: Sweep, finished: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Half of the looks are trials of all times, half those of the best places, as the first half sees them.

    By their own scores the best would be the luckiest, and lift every estimate.
    """
    every = -(-len(finished) // (_LOOKS // 2))
    spread, others = finished[::every], [record for at, record in enumerate(finished) if at % every]
    mean_M, _ = posterior(encoded_records(sweep, spread), _scores(spread)).at(encoded_records(sweep, others))
    best = np.argsort(-mean_M, kind="stable")[: _LOOKS - len(spread)]
    return sorted([*spread, *(others[at] for at in best)], key=lambda record: record.number)


def _scores(records: Sequence[TrialRecord]) -> Array:
    return np.array([record.value for record in records], dtype=float)


def encoded_records(sweep: Sweep, records: Sequence[TrialRecord]) -> Array:
    """The trials' places (N x D) in the unit cube."""
    return encoded(sweep.space, [record.settings for record in records])
