"""Optuna's samplers, by name: they propose settings."""

import warnings
from typing import Any

import numpy as np
import optuna
from optuna._transform import _SearchSpaceTransform
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from sweeps.engine.space import domains
from sweeps.engine.space.spec import Sweep


def make_sampler(sweep: Sweep, name: str, number: int) -> BaseSampler:
    """The sampler called ``name``, for trial ``number``; the grid needs none, it is counted through.

    Its random numbers hang on the sweep's seed and the trial: one that goes on after a stop draws neither those that
    were drawn before nor others than it would have drawn without the stop.
    """
    (seed,) = np.random.SeedSequence((sweep.sampler_seed, number)).generate_state(1).tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _make_sampler(sweep, name, seed, startup=min(10, sweep.trials // 3))


def _make_sampler(sweep: Sweep, name: str, seed: int, startup: int) -> BaseSampler:
    match name:
        case "tpe":
            return TPESampler(
                seed=seed,
                n_startup_trials=startup,
                multivariate=True,
                group=domains.is_conditional(sweep.space),
                constant_liar=True,
            )
        case "gp":
            return GPSampler(seed=seed, n_startup_trials=max(1, startup), warn_independent_sampling=False)
        case "cmaes":
            # Stopped trials have no value: with early stopping only the finished ones teach it.
            return ReplayedCmaEs(seed=seed, n_startup_trials=max(1, startup), warn_independent_sampling=False)
        case _:  # random; what the grid proposes is enqueued
            return RandomSampler(seed=seed)


class ReplayedCmaEs(CmaEsSampler):
    """CMA-ES that learns again, each time, what the study's finished trials have told it.

    Optuna's own keeps its optimizer in the study as a pickle, and a study may come from elsewhere: reading it would run
    what it holds. All that the optimizer has learnt are the values of its generations, so they are told to a new one.
    """

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As CMA-ES does, with the space in which to learn again."""
        self._searched, self._direction = search_space, study.direction
        return super().sample_relative(study, trial, search_space)

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> Any:
        """The optimizer after all whole generations; it is told of none a second time, so no pickle is kept either."""
        space = _SearchSpaceTransform(self._searched, transform_0_1=True)
        optimizer = self._init_optimizer(space, self._direction)
        sign = 1 if self._direction is StudyDirection.MINIMIZE else -1
        # In the order in which they ended: one that is late must not take another's place in a generation told before.
        ended = sorted(completed_trials, key=lambda trial: (trial.datetime_complete, trial.number))
        while len(told := self._get_solution_trials(ended, optimizer.generation)) >= optimizer.population_size:
            solutions = [(space.transform(t.params), sign * t.values[0]) for t in told[: optimizer.population_size]]
            optimizer.tell(solutions)
        return optimizer
