"""The ledger of a sweep: one Optuna study, in a database file in the sweep's folder or on a server.

Everything that must survive is in it: which settings were proposed, what each trial reported after each task, how it
ended and why. Sampling, early stopping, resuming, MLflow and the export all read it, so a sweep that is started again
needs nothing else; Ray's own experiment files are not used for that.

A trial's objective exists only when its last task is done: accuracy over the classes seen falls from task to task, so
the value of a stopped trial must never stand beside a finished one's.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import optuna
from optuna.trial import FrozenTrial, TrialState

from inflora.config import ConfigError
from inflora.setup import check_learner
from sweeps.engine.ledger.bill import Bill, Machine
from sweeps.engine.ledger.database import storage_to_write, study_url
from sweeps.engine.ledger.failures import Tried, change_for
from sweeps.engine.ledger.records import REFUSED, Outcome, TaskReport, TrialRecord, Waiting, now_ms
from sweeps.engine.ledger.study import check_study
from sweeps.engine.ledger.trials import (
    STATES,
    bill_so_far,
    hours_so_far,
    key_of,
    new_record,
    place_of,
    read_records,
    record_of,
    seal,
    unseal,
    validation_images,
    waiting,
)
from sweeps.engine.space import budget, domains
from sweeps.engine.space.early_stopping import Rungs
from sweeps.engine.space.objectives import Metric, direction, measure
from sweeps.engine.space.samplers import propose
from sweeps.engine.space.spec import Budget, Sweep

_SAME_SETTINGS_TRIES = 50
_WRITE_HOURS_EVERY = 10 / 3600
_CHECK_EVERY_S = 1.0
"""The time between two looks at the budgets where no report comes: time is spent without any."""


class Proposal(NamedTuple):
    """A trial to run: new, or to go on with after ``tasks_done`` tasks; ``failed`` says how it ended before."""

    number: int
    settings: dict[str, Any]
    tasks_done: int
    failed: tuple[str, ...] = ()


class _RunningTrial(NamedTuple):
    """A trial that is being run: where to write, and after which tasks it has reported."""

    trial: optuna.Trial
    reported: set[int]


class Ledger:
    """The study of one sweep: proposes trials, writes down what they report, decides which to stop and when to end.

    A trial that failed and may be tried again, or that was interrupted, is proposed again under its own number.
    """

    def __init__(self, sweep: Sweep, folder: Path, stored_bytes: int = 0) -> None:
        url = study_url(folder)
        check_study(sweep, url)
        folder.mkdir(parents=True, exist_ok=True)
        self.sweep = sweep
        self.study = optuna.create_study(
            study_name=sweep.study_name,
            storage=storage_to_write(url),
            directions=[direction(metric) for metric in sweep.objectives],
            load_if_exists=True,
            sampler=optuna.samplers.RandomSampler(0),  # never asked: every trial's settings are enqueued
        )
        if not self.study.get_trials(deepcopy=False) and not key_of(self.study):
            self.study.set_user_attr("key", seal(uuid4().hex))
        for trial in self._trials(TrialState.RUNNING):
            if "same_as" in trial.user_attrs:  # the driver died between naming the twin and dropping the trial
                self.study.tell(trial.number, state=TrialState.FAIL)
        self._read()
        # Early stopping compares with every trial there has been, also those of earlier starts.
        self._rungs = Rungs(sweep, self.records())
        self._grid = iter(domains.grid(sweep.space, sweep.grid_points) if sweep.sampler == "grid" else ())
        self._exhausted = False
        self._hours_before = self._hours_written = hours_so_far(self.study)
        self.bill = bill_so_far(self.study).interrupted()
        self._at_work: set[int] = set()
        self._started, self._start_ms = time.monotonic(), now_ms()
        self.stored_bytes = stored_bytes
        self.images = validation_images(self.study)
        self._over, self._last_check = "", -math.inf
        self.waiting = waiting(self.study)
        self.note_waiting(None)  # an earlier start's
        for settings in sweep.first:
            self.study.enqueue_trial(settings, skip_if_exists=True)

    def _read(self) -> None:
        """Know what the study says, and nothing else: all its trials, of which those that run are to be run again."""
        # What is written down is kept in mind as well: to read it again would cost more with every trial that runs.
        self._records = {record.number: record for record in read_records(self.study)}
        self._again = [trial.number for trial in self._trials(TrialState.RUNNING)]
        self._running: dict[int, _RunningTrial] = {}

    def warm_start(self, settings: Sequence[Mapping[str, Any]], source: str) -> int:
        """Try these settings first (once: a sweep that goes on has them already); how many lie in the space."""
        fitting = [each for each in settings if domains.contains(self.sweep.space, each)]
        if unseal(self.study.user_attrs.get("warm_start")) != source:
            for each in fitting:
                self.study.enqueue_trial(dict(each), skip_if_exists=True)
            self.study.set_user_attr("warm_start", seal(source))
        return len(fitting)

    def note_images(self, images: int) -> None:
        """Note how many images every trial is judged on: their luck is in all scores alike."""
        if self.images != images:
            self.study.set_user_attr("images", seal(images))
            self.images = images

    def note_place(self, address: str) -> None:
        """Note where the trials are kept: a later start waits for that place if it is away."""
        if place_of(self.study) != address:
            self.study.set_user_attr("place", seal(address))

    def note_waiting(self, now: Waiting | None) -> None:
        """Note which trials wait for room, None: none does."""
        if now != self.waiting:
            self.study.set_user_attr("waiting", seal(now))
            self.waiting = now

    def remaining(self) -> int:
        """The number of trials still to be started or finished."""
        ended = [record for record in self.records() if record.outcome is not Outcome.RUNNING]
        return max(0, self.sweep.trials - len(ended))

    def hours(self) -> float:
        """The hours that the sweep has run, over all its starts."""
        return self._hours_before + (time.monotonic() - self._started) / 3600

    def spend(self, hours: float, machines: Sequence[Machine]) -> None:
        """Note what the machines that have a price have cost for so many more hours."""
        self.bill = self.bill.after(hours, machines, self._at_work)
        if machines and self.hours() - self._hours_written >= _WRITE_HOURS_EVERY:
            self._write_hours()

    def why_over(self) -> str:
        """The reason why no trial is started any more although some were asked for; empty while they are."""
        if time.monotonic() - self._last_check >= _CHECK_EVERY_S:
            self._check_budgets()
        return self._over

    def measure_storage(self, stored_bytes: int) -> None:
        """Note how much room the trials' checkpoints take, when files have changed."""
        self.stored_bytes = stored_bytes
        if self.sweep.budget.storage_gb is not None:
            self.study.set_user_attr("stored_bytes", seal(stored_bytes))
        self._check_if_over()

    def why_hopeless(self) -> str:
        """The one reason that all first trials of this start have failed for; empty if there is none.

        What failed before this start may have been mended since.
        """
        return self._why_hopeless(self.records())

    def _why_hopeless(self, records: Sequence[TrialRecord]) -> str:
        since = [record for record in records if record.end_ms is None or record.end_ms >= self._start_ms]
        reason = budget.all_failed_alike(since, self.sweep.give_up_after)
        return f"the first {self.sweep.give_up_after} trials all failed alike: {reason}" if reason else ""

    def is_idle(self) -> bool:
        """True while nothing runs or waits to go on, so that nothing can fail and be proposed again."""
        return not self._running and not self._again

    def propose(self) -> Proposal | None:
        """The next trial, one to go on with before a new one; None when there is none now.

        One whose settings break a rule between several fails here, and the next is proposed.
        """
        while not self.why_over() and (proposal := self._next()) is not None:
            refused = _why_refused(self.sweep, proposal.settings)
            if not refused:
                return proposal
            self._end(proposal.number, Outcome.FAILED, reason=refused)
        return None

    def _next(self) -> Proposal | None:
        """The next trial, whatever its settings.

        A sampler that has found what it likes proposes it again and again in a small space; then chance proposes, and
        where chance finds nothing new either, what is left is counted through.
        """
        if self._again:
            return self._propose_again(self._again.pop(0))
        records = self.records()
        if len(records) >= self.sweep.trials or self._exhausted:
            return None
        tried = _tried(records)
        is_grid = self.sweep.sampler == "grid"
        left = self._grid if is_grid else domains.different(self.sweep.space, len(tried) + 1)
        for attempt in range(_SAME_SETTINGS_TRIES + 1):
            if (is_grid or attempt == _SAME_SETTINGS_TRIES) and not self._enqueue_next(left, tried):
                break
            trial = self._ask("random" if attempt else self.sweep.sampler)
            settings = domains.suggest(self.sweep.space, trial)
            twin = tried.get(_key(settings))
            if twin is None:
                trial.set_user_attr("settings", seal(settings))
                self._running[trial.number] = _RunningTrial(trial, set())
                self._records[trial.number] = new_record(trial.number, settings, trial.datetime_start)
                return Proposal(trial.number, settings, 0)
            trial.set_user_attr("same_as", twin)
            self.study.tell(trial, state=TrialState.FAIL)
        self._exhausted = True
        self._check_if_over()
        return None

    def _ask(self, sampler: str) -> optuna.Trial:
        """A new trial: of settings that are waiting to be tried, else of those that ``sampler`` proposes."""
        trials = self._trials()
        if not any(trial.state is TrialState.WAITING for trial in trials):
            settings, notes = propose(self.sweep, trials, sampler)
            # As Optuna enqueues a trial, with the sampler's notes: one write, so no stop comes between them.
            attributes = {**notes, "fixed_params": settings}
            self.study.add_trial(optuna.create_trial(state=TrialState.WAITING, system_attrs=attributes))
        return self.study.ask()

    def _enqueue_next(self, left: Iterator[Mapping[str, Any]], tried: Mapping[str, int]) -> bool:
        """Let the first of ``left`` that was not tried be the next, unless others wait; False if all were tried."""
        if self._trials(TrialState.WAITING):
            return True  # the first trials come before the grid
        settings = next((each for each in left if _key(each) not in tried), None)
        if settings is not None:
            self.study.enqueue_trial(dict(settings))
        return settings is not None

    def _propose_again(self, number: int) -> Proposal:
        record = self.record_of(number)
        if number not in self._running:
            trial = optuna.Trial(self.study, self._trials()[number]._trial_id)
            self._running[number] = _RunningTrial(trial, {report.tasks_done for report in record.reports})
        trial = self._running[number].trial
        # The driver may have died between asking for the trial and writing its settings down.
        settings = record.settings or domains.suggest(self.sweep.space, trial)
        trial.set_user_attr("settings", seal(settings))
        self._note(number, settings=settings)
        return Proposal(number, settings, len(record.reports), tuple(each.reason for each in record.tries))

    def report(self, number: int, report: TaskReport) -> bool:
        """Write down a task's report; whether the trial should be stopped now.

        A report that is already there (a trial resumed from an earlier checkpoint) changes nothing.
        """
        if number not in self._running:
            return False
        if report.tasks_done in self._running[number].reported:
            self.bill = self.bill.wasted(number)  # learnt twice, or told again
            return False
        self.bill = self.bill.paid(number)
        trial, reported = self._running[number]
        value = report.metrics[self.sweep.rung_metric]
        if not self.sweep.tradeoffs:  # Optuna refuses reports of several objectives
            trial.report(value, step=report.tasks_done)
        trial.set_user_attr(f"task:{report.tasks_done}", seal(report.model_dump()))
        reports = sorted([*self._records[number].reports, report], key=lambda each: each.tasks_done)
        self._note(number, reports=reports)
        reported.add(report.tasks_done)
        stop = self._rungs.falls_behind(number, report.tasks_done, value)
        if report.tasks_done == report.tasks:
            return False  # it ends by itself, and what it has spent is judged with its result
        if not stop:
            self._check_budgets()
            return False
        self._end(number, Outcome.PRUNED, reason=f"behind others after {report.tasks_done} tasks")
        return True

    def note_log(self, number: int, log: str) -> None:
        """Note where a trial that runs writes its log: of several tries the last one counts."""
        if number in self._running:
            self._running[number].trial.set_user_attr("log", seal(log))
            self._note(number, log=log)
            self.bill = self.bill.wasted(number)  # by a worker before it, if one was lost
            self._at_work.add(number)

    def close(self, number: int) -> None:
        """The trial has ended by itself: finished if all it is judged by is there and finite, failed otherwise."""
        if number not in self._running or number in self._again:
            return
        reports = self.record_of(number).reports
        is_done = bool(reports) and reports[-1].tasks_done == reports[-1].tasks
        if not is_done and self.why_over():
            return  # stopped with the sweep: interrupted, not failed
        measured = {metric: self._measure(metric, reports) if is_done else None for metric in self.sweep.judged_by}
        if missing := [metric for metric, value in measured.items() if value is None]:
            self._end(number, Outcome.FAILED, reason=f"ended without {', '.join(missing)}")
            return
        values = {metric: value for metric, value in measured.items() if value is not None}
        if strange := [f"{metric} is {value}" for metric, value in values.items() if not math.isfinite(value)]:
            self._end(number, Outcome.FAILED, reason=", ".join(strange))
            return
        for constraint in self.sweep.constraints:
            self._running[number].trial.set_constraint(constraint.text, constraint.excess(values[constraint.metric]))
        self._end(number, Outcome.FINISHED, [values[metric] for metric in self.sweep.objectives])

    def _measure(self, metric: Metric, reports: Sequence[TaskReport]) -> float | None:
        return measure(metric, reports, self.sweep.resources.gpus)

    def fail(self, number: int, reason: str) -> None:
        """The trial has failed; it is proposed again where that can help, else it ends with ``reason``."""
        if number not in self._running or number in self._again:
            return
        self._leave_off({number})
        trial, record = self._running[number].trial, self.record_of(number)
        tries = [*record.tries, Tried(reason, len(record.reports))]
        trial.set_user_attr("tries", seal(tries))
        self._note(number, tries=tuple(tries))
        change = change_for(tries, self.sweep.retries, self.sweep.resources.gpus_per_worker)
        if change is None:
            self._end(number, Outcome.FAILED, reason=reason)
        else:
            trial.set_user_attr("again", seal(change))
            self._note(number, again=change)
            self._again.append(number)

    def take_back(self) -> int:
        """Propose again all trials that run, through no fault of theirs; the number of tasks reported so far.

        For when what runs them has stopped, and is started anew: perhaps amid a change that the study has, or has not.
        """
        self._leave_off(set(self._running))
        self._read()
        return sum(len(record.reports) for record in self.records())

    def _leave_off(self, numbers: Set[int]) -> None:
        """Note that these trials are not at work any more, whatever they were at."""
        self._at_work -= numbers
        for number in numbers:
            self.bill = self.bill.wasted(number)

    def _end(self, number: int, outcome: Outcome, values: list[float] | None = None, reason: str = "") -> None:
        if reason:
            self._running[number].trial.set_user_attr("reason", seal(reason))
        self._records[number] = record_of(self.study.tell(number, values, state=STATES[outcome]))
        del self._running[number]
        self._leave_off({number})
        self._rungs.end(number, outcome)
        self._write_hours()
        self._check_if_over()

    def _write_hours(self) -> None:
        """Keep the hours as they pass, not on leaving: a driver that is killed must not get them back."""
        self._hours_written = self.hours()
        self.study.set_user_attr("hours", seal(self._hours_written))
        if self.bill != Bill():
            self.study.set_user_attr("bill", seal(self.bill.kept()))

    def _check_budgets(self) -> None:
        """Between ends of trials only a budget can end the sweep."""
        if not self._over and self.sweep.budget != Budget():
            self._check_if_over()

    def _check_if_over(self) -> None:
        """Ask all that can end the sweep; what has ended it stays, until it is started again."""
        self._last_check = time.monotonic()
        if self.hours() - self._hours_written >= _WRITE_HOURS_EVERY:
            self._write_hours()
        records = self.records()
        spent = budget.why_over(self.sweep, records, self.hours(), self.stored_bytes)
        # What runs is a part of the search: it is waited for.
        exhausted = "every setting of the space has been tried" if self._exhausted and self.is_idle() else ""
        self._over = self._over or self._why_hopeless(records) or spent or exhausted

    def records(self) -> list[TrialRecord]:
        """All trials, oldest first; proposals dropped for repeating another trial are not among them."""
        return list(self._records.values())

    def record_of(self, number: int) -> TrialRecord:
        """One trial."""
        return self._records[number]

    def _note(self, number: int, **news: Any) -> None:
        self._records[number] = self._records[number]._replace(**news)

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)


def _key(settings: Mapping[str, Any]) -> str:
    return repr(sorted(settings.items()))


def _why_refused(sweep: Sweep, settings: Mapping[str, Any]) -> str:
    """Why no trial can run with these settings, each of which is allowed; empty if one can."""
    try:
        check_learner(sweep.config(settings))
    except ConfigError as error:
        return f"{REFUSED}{error}"
    return ""


def _tried(records: Sequence[TrialRecord]) -> dict[str, int]:
    """The settings that no new trial may have, and the trial that had them.

    Those of a trial that failed when it ran may be tried once more: it may have been the machine.
    """
    tried: dict[str, int] = {}
    failed: set[str] = set()
    for record in records:
        key = _key(record.settings)
        if record.outcome is not Outcome.FAILED or record.was_refused or key in failed:
            tried[key] = record.number
        else:
            failed.add(key)
    return tried
