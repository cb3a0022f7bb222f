"""Optuna's pruners, by name: they stop the trials that fall behind."""

from statistics import median

import optuna
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from sweeps.engine.ledger.records import Outcome, TrialRecord
from sweeps.engine.space.spec import Sweep


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
        self._trials: list[optuna.Trial] = []
        for record in records:
            for report in record.reports:
                self.falls_behind(record.number, report.tasks_done, report.metrics[self.metric])
            self.end(record.number, record.outcome)

    def falls_behind(self, number: int, tasks_done: int, value: float) -> bool:
        """Take down what a trial has reported; whether it should be stopped."""
        trial = self._numbered(number)
        trial.report(value, step=tasks_done)
        return trial.should_prune()

    def _numbered(self, number: int) -> optuna.Trial:
        """The trial of this number: the bracket that Hyperband puts it into hangs on it, and must be the same later."""
        while len(self._trials) <= number:
            self._trials.append(self._study.ask())
        return self._trials[number]

    def end(self, number: int, outcome: Outcome) -> None:
        """The trial reports no more: some rules only compare with finished ones."""
        if outcome is Outcome.RUNNING or number >= len(self._trials):
            return
        last = self._study.get_trials(deepcopy=False)[number]
        if last.last_step is None:
            return  # it has reported nothing
        if outcome is Outcome.FINISHED:
            self._study.tell(number, last.intermediate_values[last.last_step])
        else:
            self._study.tell(number, state=TrialState.FAIL)


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
