"""Who proposes settings, and who says which trials fall behind: Optuna's samplers and pruners, by name."""

import warnings
from statistics import median
from typing import Any

import numpy as np
import optuna
from optuna._transform import _SearchSpaceTransform
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from sweeps.engine import space
from sweeps.engine.records import Outcome, TrialRecord
from sweeps.engine.spec import Sweep


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
                group=space.is_conditional(sweep.space),
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


class Rungs:
    """Early stopping at equal numbers of tasks done, on what all trials of the ledger have reported.

    A study of its own, in memory: Optuna's pruners want one objective, and here more is always better, whatever the
    sweep looks for. It is rebuilt from the ledger when a sweep goes on.
    """

    def __init__(self, sweep: Sweep, records: list[TrialRecord]) -> None:
        self.metric = sweep.rung_metric
        self._study = optuna.create_study(
            study_name=sweep.study_name,
            direction="maximize",
            sampler=RandomSampler(0),
            pruner=_make_pruner(sweep),
        )
        self._trials: dict[int, optuna.Trial] = {}
        for record in records:
            for report in record.reports:
                self.falls_behind(record.number, report.tasks_done, report.metrics[self.metric])
            self.end(record.number, record.outcome)

    def falls_behind(self, number: int, tasks_done: int, value: float) -> bool:
        """Take down what a trial has reported; whether it should be stopped."""
        trial = self._trials.get(number) or self._study.ask()
        self._trials[number] = trial
        trial.report(value, step=tasks_done)
        return trial.should_prune()

    def end(self, number: int, outcome: Outcome) -> None:
        """The trial reports no more: some rules only compare with finished ones."""
        trial = self._trials.get(number)
        if trial is None or outcome is Outcome.RUNNING:
            return
        last = self._study.get_trials(deepcopy=False)[trial.number]
        finished = outcome is Outcome.FINISHED
        self._study.tell(
            trial,
            last.intermediate_values[last.last_step] if finished and last.last_step is not None else None,
            state=TrialState.COMPLETE if finished else TrialState.FAIL,
        )
        del self._trials[number]


class BehindMedian(optuna.pruners.BasePruner):
    """Stops a trial that is, after its grace, below the median of at least three finished ones at equal tasks done.

    Optuna's own compares with the best that the trial has reported so far: of an accuracy that falls from task to task
    that is the first task's, and nothing would ever be stopped.
    """

    def __init__(self, grace_tasks: int) -> None:
        self.grace_tasks = grace_tasks

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        done = trial.last_step
        if done is None or done < self.grace_tasks:
            return False
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        values = [other.intermediate_values[done] for other in finished if done in other.intermediate_values]
        return len(values) >= 3 and trial.intermediate_values[done] < median(values)


def _make_pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
    pruners = optuna.pruners
    match sweep.early_stopping:
        case "asha":
            return pruners.SuccessiveHalvingPruner(min_resource=sweep.grace_tasks, reduction_factor=sweep.reduction)
        case "hyperband":
            return pruners.HyperbandPruner(
                min_resource=sweep.grace_tasks,
                max_resource=max(sweep.grace_tasks, sweep.base.data.task_count),
                reduction_factor=sweep.reduction,
            )
        case "median":
            return BehindMedian(sweep.grace_tasks)
        case "none":
            return pruners.NopPruner()
