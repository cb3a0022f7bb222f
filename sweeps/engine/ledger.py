"""The ledger of a sweep: one Optuna study, a database file in the sweep's folder.

Everything that must survive is in it: which settings were proposed, what each trial reported after each task, how it
ended and why. Sampling, early stopping, resuming, MLflow and the export all read it, so a sweep that is started again
needs nothing else; Ray's own experiment files are not used for that.

A trial's objective exists only when its last task is done: accuracy over the classes seen falls from task to task, so
the value of a stopped trial must never stand beside a finished one's.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from inflora.config import ConfigError
from sweeps.engine.records import Outcome, TaskReport, TrialRecord
from sweeps.engine.spec import Sweep

_SAME_SETTINGS_TRIES = 50
RUNG_METRIC = "acc/seen"
"""What trials are compared by at equal numbers of tasks done."""


class Proposal(NamedTuple):
    """A trial to run: new, or interrupted after ``tasks_done`` tasks."""

    number: int
    settings: dict[str, Any]
    tasks_done: int


class Ledger:
    """The study of one sweep: proposes trials, writes down what they report, decides which to stop."""

    def __init__(self, sweep: Sweep, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.sweep = sweep
        self.exhausted = False
        self.study = optuna.create_study(
            study_name=sweep.study_name,
            storage=study_url(folder),
            direction="maximize",
            load_if_exists=True,
            pruner=optuna.pruners.SuccessiveHalvingPruner(
                min_resource=sweep.grace_tasks, reduction_factor=sweep.reduction
            ),
        )
        # A sweep that goes on must not draw the random numbers of its first start again.
        seed = sweep.sampler_seed + len(self._trials(*_ENDED, TrialState.RUNNING))
        self.study.sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=min(10, sweep.trials // 3), multivariate=True, constant_liar=True
        )
        self._by_chance = optuna.load_study(
            study_name=sweep.study_name,
            storage=self.study._storage,
            sampler=optuna.samplers.RandomSampler(seed=seed),
        )
        for trial in self._trials(TrialState.RUNNING):
            if "same_as" in trial.user_attrs:
                self.study.tell(trial.number, state=TrialState.FAIL)
        self._interrupted = [trial.number for trial in self._trials(TrialState.RUNNING)]
        for settings in sweep.first:
            fixed = {k: v for path, value in settings.items() for k, v in sweep.space[path].fix(path, value).items()}
            self.study.enqueue_trial(fixed, skip_if_exists=True)

    def remaining(self) -> int:
        """How many trials are still to be started or finished."""
        ended = [t for t in self._trials(*_ENDED) if "same_as" not in t.user_attrs]
        return max(0, self.sweep.trials - len(ended))

    def propose(self) -> Proposal | None:
        """The next trial: an interrupted one before a new one; None when every setting of the space has been tried.

        A sampler that has found what it likes proposes it again and again in a small space; then chance proposes.
        """
        if self._interrupted:
            return self._propose_again(self._interrupted.pop(0))
        for attempt in range(_SAME_SETTINGS_TRIES):
            trial = (self._by_chance if attempt else self.study).ask()
            settings = self.sweep.suggest(trial)
            tried = self._trials(TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
            twin = next((t for t in tried if t.user_attrs.get("settings") == settings), None)
            if twin is None:
                trial.set_user_attr("settings", settings)
                return Proposal(trial.number, settings, 0)
            trial.set_user_attr("same_as", twin.number)
            self.study.tell(trial, state=TrialState.FAIL)
        self.exhausted = True
        return None

    def _propose_again(self, number: int) -> Proposal:
        record, trial = self.record_of(number), self._open_trial(number)
        assert trial is not None
        # The driver may have died between asking for the trial and writing its settings down.
        settings = record.settings or self.sweep.suggest(trial)
        trial.set_user_attr("settings", settings)
        return Proposal(number, settings, len(record.reports))

    def report(self, number: int, report: TaskReport) -> bool:
        """Write down a task's report; whether the trial should be stopped now.

        A report that is already there (a trial resumed from an earlier checkpoint) changes nothing.
        """
        trial = self._open_trial(number)
        if trial is None or f"task:{report.tasks_done}" in trial.user_attrs:
            return False
        trial.report(report.metrics[RUNG_METRIC], step=report.tasks_done)
        trial.set_user_attr(f"task:{report.tasks_done}", report.model_dump())
        if report.tasks_done == report.tasks or not trial.should_prune():
            return False
        self.study.tell(number, state=TrialState.PRUNED)
        return True

    def close(self, number: int) -> None:
        """The trial has ended by itself: finished if its objective is there and is a number, failed otherwise."""
        if self._open_trial(number) is None:
            return
        reports = self.record_of(number).reports
        is_done = bool(reports) and reports[-1].tasks_done == reports[-1].tasks
        value = reports[-1].metrics.get(self.sweep.objective) if is_done else None
        if value is None:
            self.fail(number, f"ended without {self.sweep.objective}")
        elif not math.isfinite(value):
            self.fail(number, f"{self.sweep.objective} is {value}")
        else:
            self.study.tell(number, value)

    def fail(self, number: int, reason: str) -> None:
        """The trial has failed; ``reason`` is kept with it."""
        trial = self._open_trial(number)
        if trial is not None:
            trial.set_user_attr("reason", reason)
            self.study.tell(number, state=TrialState.FAIL)

    def records(self) -> list[TrialRecord]:
        """All trials, oldest first; proposals dropped for repeating another trial are not among them."""
        return read_records(self.study)

    def record_of(self, number: int) -> TrialRecord:
        """One trial."""
        return _record(self.study.get_trials(deepcopy=False)[number])

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states)

    def _open_trial(self, number: int) -> optuna.Trial | None:
        """The trial, for writing, unless it has ended."""
        frozen = self.study.get_trials(deepcopy=False)[number]
        return None if frozen.state.is_finished() else optuna.Trial(self.study, frozen._trial_id)


def load_study(sweep: Sweep, folder: Path) -> optuna.Study:
    """A sweep's study, to read it.

    Raises:
        ConfigError: It is not there, or not a study of this version's.
    """
    try:
        return optuna.load_study(study_name=sweep.study_name, storage=study_url(folder))
    except (KeyError, SQLAlchemyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"cannot read the study {sweep.study_name} in {folder / 'study.db'}: {reason}") from None


def study_url(folder: Path) -> str:
    """Where a sweep's study is: one database file in its folder, written by the driver alone."""
    return f"sqlite:///{(folder / 'study.db').absolute()}"


def read_records(study: optuna.Study) -> list[TrialRecord]:
    """All trials of a study, as ``Ledger.records``."""
    trials = study.get_trials(deepcopy=False)
    return [_record(t) for t in trials if "same_as" not in t.user_attrs and t.state is not TrialState.WAITING]


_OUTCOMES = {
    TrialState.RUNNING: Outcome.RUNNING,
    TrialState.COMPLETE: Outcome.FINISHED,
    TrialState.PRUNED: Outcome.PRUNED,
    TrialState.FAIL: Outcome.FAILED,
}
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def _record(trial: FrozenTrial) -> TrialRecord:
    reports = [TaskReport.model_validate(v) for k, v in trial.user_attrs.items() if k.startswith("task:")]
    return TrialRecord(
        number=trial.number,
        settings=trial.user_attrs.get("settings", {}),
        outcome=_OUTCOMES[trial.state],
        reports=sorted(reports, key=lambda report: report.tasks_done),
        value=trial.value if trial.state is TrialState.COMPLETE else None,
        reason=trial.user_attrs.get("reason", ""),
        start_ms=_milliseconds(trial.datetime_start) or 0,
        end_ms=_milliseconds(trial.datetime_complete),
    )


def _milliseconds(moment: Any) -> int | None:
    return None if moment is None else int(moment.timestamp() * 1000)
