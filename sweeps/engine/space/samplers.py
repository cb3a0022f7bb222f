"""Samplers, by name: they propose settings."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna._transform import _SearchSpaceTransform
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FixedTrial, FrozenTrial, TrialState

from sweeps.engine.space import domains
from sweeps.engine.space.acquisition import Looks, next_settings, spread_settings
from sweeps.engine.space.objectives import direction
from sweeps.engine.space.spec import Sweep

# Stopped trials have no value: with early stopping only the finished ones teach CMA-ES.
_TEACHING = {
    "tpe": (TrialState.COMPLETE, TrialState.PRUNED),
    "gp": (TrialState.COMPLETE, TrialState.PRUNED),  # where it falls back on TPE
    "cmaes": (TrialState.COMPLETE,),
}


_BATCHES = 4
"""The least number of batches of trials in which there is something to learn from those before."""


class Proposed(NamedTuple):
    """Settings that a sampler proposes, and what it notes of them for itself in the study (Optuna's system attributes).

    CMA-ES notes the generation that a trial belongs to.
    """

    settings: dict[str, Any]
    notes: dict[str, Any]


def propose(sweep: Sweep, trials: Sequence[FrozenTrial], sampler: str) -> Proposed:
    """The settings that ``sampler`` proposes for a sweep's next trial: a function of those it has.

    Before there is anything to learn from, samplers that learn spread their trials over the space: those of a large
    batch, chosen one by one at random, would leave holes in it.
    """
    known = [trial for trial in trials if trial.state is not TrialState.WAITING]
    if sampler == "gp" and not sweep.gp_falls_back:
        return Proposed(next_settings(sweep.space, _looks(known, sweep.sampler_seed)), {})
    if sampler in _TEACHING and sum(trial.state in _TEACHING[sampler] for trial in known) < startup(sweep):
        return Proposed(spread_settings(sweep.space, len(known), sweep.sampler_seed), {})
    # Chance needs to know nothing.
    return ask(sweep, [] if sampler == "random" else known, make_sampler(sweep, sampler, len(trials)))


def ask(sweep: Sweep, trials: Sequence[FrozenTrial], sampler: BaseSampler) -> Proposed:
    """The settings that one of Optuna's samplers proposes.

    Samplers know linear and logarithmic scales. They are asked in a study in memory, whose trials are the real ones on
    the sampler's scales, so that the study on disk holds the settings themselves.
    """
    space = {path: domain.transformed() for path, domain in sweep.space.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(directions=[direction(metric) for metric in sweep.objectives], sampler=sampler)
    study.add_trials(_transformed(sweep, space, trial) for trial in trials)
    asked = study.ask()
    chosen = domains.suggest(space, asked)
    settings = {path: sweep.space[path].inverse_transform(value) for path, value in chosen.items()}
    return Proposed(settings, study.get_trials(deepcopy=False)[-1].system_attrs)


def _looks(trials: Sequence[FrozenTrial], seed: int) -> Looks:
    """What the trials say to the Gaussian process; one that was stopped early says nothing."""
    finished = [(trial.params, trial.values[0]) for trial in trials if trial.state is TrialState.COMPLETE]
    running = [trial.params for trial in trials if trial.state is TrialState.RUNNING and trial.params]
    failed = [t.params for t in trials if t.state is TrialState.FAIL and t.params and "same_as" not in t.user_attrs]
    return Looks(finished, running, failed, len(trials), seed)


def _transformed(sweep: Sweep, space: domains.Space, trial: FrozenTrial) -> FrozenTrial:
    """A trial on the sampler's scales, without our own attributes: no sampler reads them, and the study copies all."""
    known = FixedTrial({path: sweep.space[path].transform(value) for path, value in trial.params.items()})
    if trial.params:
        domains.suggest(space, known)
    twin = copy.copy(trial)
    twin.params, twin.distributions, twin.user_attrs = known.params, known.distributions, {}
    return twin


def make_sampler(sweep: Sweep, name: str, number: int) -> BaseSampler:
    """The sampler called ``name``, for trial ``number``; the grid needs none, it is counted through.

    Its random numbers hang on the sweep's seed and the trial: one that goes on after a stop draws neither those that
    were drawn before nor others than it would have drawn without the stop.
    """
    (seed,) = np.random.SeedSequence((sweep.sampler_seed, number)).generate_state(1).tolist()
    match name:
        case "tpe" | "gp":
            return TPESampler(
                seed=seed,
                n_startup_trials=0,
                multivariate=True,  # rank and learning rate depend on each other
                group=domains.is_conditional(sweep.space),
                constant_liar=True,  # trials that run side by side keep their distance
            )
        case "cmaes":
            return ReplayedCmaEs(seed=seed, n_startup_trials=1, warn_independent_sampling=False)
        case _:  # random; what the grid proposes is enqueued
            return RandomSampler(seed=seed)


def startup(sweep: Sweep) -> int:
    """The trials that must have ended before a sampler is asked; Optuna's 10 would be most of a small sweep."""
    return max(1, min(10, sweep.trials // 3))


def why_blind(sweep: Sweep, at_a_time: int) -> str:
    """Why a search with so many trials at a time learns little; empty if it learns enough."""
    if sweep.sampler not in _TEACHING or at_a_time * _BATCHES <= sweep.trials:
        return ""
    return (
        f"{at_a_time} of {sweep.trials} trials at a time: the first are chosen blind, evenly spread over the space; to "
        f"learn from results a search has {_BATCHES * at_a_time} trials (--num-trials), or fewer at a time"
    )


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
