"""Budgets: pure rules that say how far each bound of a sweep is used, and when it ends the sweep.

Another budget is a field of ``Budget`` (spec.py), which makes its option, and a rule here.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from sweeps.engine.ledger.failures import alike
from sweeps.engine.ledger.records import Outcome, TrialRecord, best_record
from sweeps.engine.space.estimate import ENOUGH, NEXT, estimate
from sweeps.engine.space.objectives import gpu_hours
from sweeps.engine.space.spec import Sweep


class Standing(NamedTuple):
    """A budget now: the line that tells of it (empty: none), and why it ends the sweep (empty: it does not)."""

    line: str = ""
    reason: str = ""


Rule = Callable[[Sweep, Sequence[TrialRecord], float, int], Standing]
"""A budget's standing by the sweep, its trials, the hours it has run and the bytes that its trials store."""


def time(sweep: Sweep, records: Sequence[TrialRecord], hours: float, stored_bytes: int) -> Standing:
    """Wall-clock time, over all starts."""
    return _used(hours, sweep.budget.hours, "hours", "hours so far", "time")


def gpu_time(sweep: Sweep, records: Sequence[TrialRecord], hours: float, stored_bytes: int) -> Standing:
    """Training time of all trials, running ones included, times their GPUs."""
    spent = gpu_hours_spent(sweep, records)
    if not spent and sweep.budget.gpu_hours is None:
        return Standing()
    return _used(spent, sweep.budget.gpu_hours, "GPU-hours", "GPU-hours of training", "GPU")


def storage(sweep: Sweep, records: Sequence[TrialRecord], hours: float, stored_bytes: int) -> Standing:
    """Checkpoints of the trials, as they were when one last ended."""
    if sweep.budget.storage_gb is None:
        return Standing()
    return _used(stored_bytes / 1e9, sweep.budget.storage_gb, "GB", "GB of checkpoints", "storage")


def target(sweep: Sweep, records: Sequence[TrialRecord], hours: float, stored_bytes: int) -> Standing:
    """A finished trial that is good enough."""
    best, wanted = best_record(records), sweep.budget.target
    if wanted is None or best is None or best.value is None:
        return Standing()
    reason = f"target reached: {sweep.objective} {best.value:.4f} in trial {best.number}, asked for {wanted:g}"
    return Standing(f"target: {sweep.objective} {wanted:g}", reason if best.value >= wanted else "")


def patience(sweep: Sweep, records: Sequence[TrialRecord], hours: float, stored_bytes: int) -> Standing:
    """Trials that ended, however they did, since the one with the highest score did."""
    best, most = best_record(records), sweep.budget.patience
    if most is None or best is None:
        return Standing()
    # Ends are compared, not numbers: a trial that began before the best one may end long after it.
    since = sum(r.end_ms is not None and r.end_ms > (best.end_ms or 0) for r in records)
    reason = f"patience over: {since} trials ended since trial {best.number} scored highest"
    return Standing(f"patience: {since} of {most} trials without a higher score", reason if since >= most else "")


def expected_gain(sweep: Sweep, records: Sequence[TrialRecord], hours: float, stored_bytes: int) -> Standing:
    """The score that more trials are expected to add; worked out anew only when one has finished."""
    least, known = sweep.budget.until_gain, estimate(sweep, records) if sweep.budget.until_gain is not None else None
    if least is None or known is None or len(known.finished) < ENOUGH:
        return Standing()
    points = 100 * known.expected_gain()
    reason = f"little left to gain: {NEXT} more trials are expected to add {points:.2f} points, asked for {least:g}"
    return Standing(
        f"expected gain: until {NEXT} trials add less than {least:g} points", reason if points < least else ""
    )


# In this order: of two reasons at the same moment the first is told.
RULES: tuple[Rule, ...] = (time, gpu_time, storage, target, patience, expected_gain)


def _used(used: float, limit: float | None, unit: str, shown_as: str, name: str) -> Standing:
    """A quantity that is used up."""
    if limit is None:
        return Standing(f"{used:.2f} {shown_as}")
    reason = f"{name} budget spent: {used:.2f} of {limit:g} {unit}" if used >= limit else ""
    return Standing(f"{used:.2f} {shown_as}, {max(0.0, limit - used):.2f} left", reason)


def standings(sweep: Sweep, records: Sequence[TrialRecord], hours: float, stored_bytes: int) -> list[Standing]:
    """Every budget's standing."""
    return [rule(sweep, records, hours, stored_bytes) for rule in RULES]


def why_over(sweep: Sweep, records: Sequence[TrialRecord], hours: float, stored_bytes: int) -> str:
    """The first reason why the sweep takes no more trials; empty while it does."""
    return next((each.reason for each in standings(sweep, records, hours, stored_bytes) if each.reason), "")


def gpu_hours_spent(sweep: Sweep, records: Sequence[TrialRecord]) -> float:
    """Training time of all trials times their GPUs."""
    return sum(gpu_hours(record.reports, sweep.resources.gpus) for record in records)


def all_failed_alike(records: Sequence[TrialRecord], first: int) -> str:
    """The reason why the first trials to end have all failed; empty if they have not.

    Those that were refused are none of them: they have run nowhere, and others may be accepted.
    """
    tried = [r for r in records if r.outcome is not Outcome.RUNNING and not r.was_refused]
    ended = sorted(tried, key=lambda r: r.end_ms or 0)[:first]
    failed = [record.reason for record in ended if record.outcome is Outcome.FAILED]
    return failed[0] if len(failed) == first and alike(failed) else ""
