"""Why a sweep ends before all its trials are done, and what is left until then (pure)."""

from collections.abc import Sequence

from sweeps.engine.failures import alike
from sweeps.engine.metrics import gpu_hours
from sweeps.engine.records import Outcome, TrialRecord, best_record
from sweeps.engine.spec import Sweep


def gpu_hours_spent(sweep: Sweep, records: Sequence[TrialRecord]) -> float:
    """Training time of all trials times their GPUs."""
    return sum(gpu_hours(record.reports, sweep.resources.gpus) for record in records)


def why_over(sweep: Sweep, records: Sequence[TrialRecord], hours: float) -> str:
    """Why the sweep takes no more trials, after ``hours`` of it; empty while it does."""
    budget = sweep.budget
    if budget.hours is not None and hours >= budget.hours:
        return f"time budget spent: {hours:.2f} of {budget.hours:g} hours"
    if budget.gpu_hours is not None and (spent := gpu_hours_spent(sweep, records)) >= budget.gpu_hours:
        return f"GPU budget spent: {spent:.2f} of {budget.gpu_hours:g} GPU-hours"
    best = best_record(records)
    if best is None or best.value is None:
        return ""
    if budget.target is not None and best.value >= budget.target:
        return f"target reached: {sweep.objective} {best.value:.4f} in trial {best.number}, asked for {budget.target:g}"
    since = ended_since(records, best)
    if budget.patience is not None and since >= budget.patience:
        return f"patience over: {since} trials ended since trial {best.number} was the best"
    return ""


def ended_since(records: Sequence[TrialRecord], best: TrialRecord) -> int:
    """How many trials have ended after ``best`` did."""
    return sum(r.end_ms is not None and r.end_ms > (best.end_ms or 0) for r in records)


def all_failed_alike(records: Sequence[TrialRecord], first: int) -> str:
    """The reason why the first trials to end have all failed; empty if they have not."""
    ended = sorted((r for r in records if r.outcome is not Outcome.RUNNING), key=lambda r: r.end_ms or 0)[:first]
    failed = [record.reason for record in ended if record.outcome is Outcome.FAILED]
    return failed[0] if len(failed) == first and alike(failed) else ""


def progress(sweep: Sweep, records: Sequence[TrialRecord], hours: float, *, driven: bool = True) -> list[str]:
    """How far the sweep is: a line for its trials, one for its time, one for every other bound that it has.

    ``driven``: a driver is alive; without one what runs was interrupted, and nothing goes on by itself.
    """
    count = {outcome: sum(record.outcome is outcome for record in records) for outcome in Outcome}
    ended = len(records) - count[Outcome.RUNNING]
    known = ", ".join(f"{number} {standing(outcome, driven=driven)}" for outcome, number in count.items() if number)
    lines = [f"{ended} of {sweep.trials} trials ended" + (f": {known}" if known else "")]
    budget, gpus = sweep.budget, gpu_hours_spent(sweep, records)
    left = f", {max(0.0, budget.hours - hours):.2f} left" if budget.hours is not None else ""
    pace = (
        f", about {hours / ended * (sweep.trials - ended):.2f} to go at this pace"
        if driven and 0 < ended < sweep.trials
        else ""
    )
    lines.append(f"{hours:.2f} hours so far{left}{pace}")
    if gpus or budget.gpu_hours is not None:
        left = f", {max(0.0, budget.gpu_hours - gpus):.2f} left" if budget.gpu_hours is not None else ""
        lines.append(f"{gpus:.2f} GPU-hours of training{left}")
    if saved_s := sum(report.saved_s for record in records for report in record.reports):
        lines.append(f"{saved_s / 60:.1f} minutes of training saved by sharing first tasks between trials")
    best = best_record(records)
    if best is not None and best.value is not None:
        lines.append(f"best so far: trial {best.number}, {sweep.objective} {best.value:.4f}")
        if budget.target is not None:
            lines.append(f"target: {sweep.objective} {budget.target:g}")
        if budget.patience is not None:
            lines.append(f"patience: {ended_since(records, best)} of {budget.patience} trials without a new best")
    if why := why_over(sweep, records, hours):
        lines.append(why)
    elif not driven and ended < sweep.trials:
        lines.append("stopped: no process runs this sweep; the command that began it goes on with it")
    return lines


def standing(outcome: Outcome, *, driven: bool) -> str:
    """How a trial stands, in a word: without a driver nothing runs."""
    return "interrupted" if outcome is Outcome.RUNNING and not driven else str(outcome)
