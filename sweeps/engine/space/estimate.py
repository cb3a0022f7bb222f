"""The estimate of a sweep's scores: what its finished trials together say of each of them, and of any other setting.

A trial's own score is one noisy look, and the best of many flatters itself; its neighbours in the space know better.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sweeps.engine.ledger.records import Outcome, TrialRecord, ranking
from sweeps.engine.space.acquisition import imagined_gain
from sweeps.engine.space.cube import encoded
from sweeps.engine.space.gaussian_process import Array, Posterior, posterior
from sweeps.engine.space.spec import Sweep

_WITHIN = 1.96
"""Standard deviations from the middle of a normal distribution to the bounds of its central 95 %."""
_LOOKS = 400
"""The finished trials that an estimate is made from: of more, the last ones and the best."""


class Estimate(NamedTuple):
    """What is believed of a score: its mean, and the bounds between which it lies in 95 of 100 cases."""

    mean: float
    low: float
    high: float


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
        mean_M, sd_M = self.posterior.at(encoded(self.sweep.space, several))
        share_M = np.clip(mean_M, 0, 1)
        luck_M = share_M * (1 - share_M) / self.images if self.images else np.zeros_like(mean_M)
        half_M = _WITHIN * np.sqrt(sd_M**2 + luck_M)
        return [Estimate(float(m), float(m - h), float(m + h)) for m, h in zip(mean_M, half_M, strict=True)]

    def of_trials(self) -> dict[int, Estimate]:
        """Trial number -> estimate, of all finished trials."""
        estimates = self.of_all([record.settings for record in self.finished])
        return {record.number: each for record, each in zip(self.finished, estimates, strict=True)}

    def best(self) -> TrialRecord | None:
        """The finished trial that keeps all constraints and has the best estimate: the setting to train."""
        known = self.of_trials()
        allowed = ranking(self.finished)
        return max(allowed, key=lambda record: (known[record.number].mean, -record.number), default=None)

    def expected_gain(self, trials: int) -> float:
        """What the next ``trials`` are expected to add to the score of the setting to train, in the objective's unit.

        They are imagined where they would be proposed, with results drawn from the posterior: the mean of the best
        estimate after them, less the best one now (the knowledge gradient of a batch; Wu and Frazier, 2016).
        """
        return imagined_gain(self.sweep.space, self.posterior, encoded_records(self.sweep, self.finished), trials)


def estimate(sweep: Sweep, records: Sequence[TrialRecord], images: int | None = None) -> Estimates | None:
    """What all finished trials of a sweep say; None while there is none."""
    finished = tuple(r for r in records if r.outcome is Outcome.FINISHED and r.value is not None)
    if not finished:
        return None
    looks = finished if len(finished) <= _LOOKS else _most_telling(finished)
    scores = np.array([record.value for record in looks], dtype=float)
    return Estimates(sweep, finished, posterior(encoded_records(sweep, looks), scores), images)


def _most_telling(finished: Sequence[TrialRecord]) -> tuple[TrialRecord, ...]:
    """Half of the looks are the best trials, half the last others: the time for an estimate grows with their cube."""
    best = sorted(finished, key=lambda record: -(record.value or 0.0))[: _LOOKS // 2]
    chosen = {record.number for record in best}
    last = [record for record in finished if record.number not in chosen][-(_LOOKS - len(best)) :]
    return tuple(sorted([*best, *last], key=lambda record: record.number))


def encoded_records(sweep: Sweep, records: Sequence[TrialRecord]) -> Array:
    """The trials' places (N x D) in the unit cube."""
    return encoded(sweep.space, [record.settings for record in records])
