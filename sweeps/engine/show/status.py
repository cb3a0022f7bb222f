"""The lines that say how far a sweep is: on a terminal, in ``sweeps status``, on the report's page."""

from collections.abc import Sequence

from sweeps.engine.ledger.records import Outcome, TrialRecord, best_record
from sweeps.engine.space.budget import standings, why_over
from sweeps.engine.space.spec import Sweep


def status_lines(
    sweep: Sweep, records: Sequence[TrialRecord], hours: float, stored_bytes: int, *, driven: bool = True
) -> list[str]:
    """A line for the trials, one for every budget, one for the best trial, one for why nothing more comes.

    ``driven``: a driver is alive; without one what runs was interrupted, and nothing goes on by itself.
    """
    count = {outcome: sum(record.outcome is outcome for record in records) for outcome in Outcome}
    ended = len(records) - count[Outcome.RUNNING]
    known = ", ".join(f"{number} {outcome_word(each, driven=driven)}" for each, number in count.items() if number)
    lines = [f"{ended} of {sweep.trials} trials ended" + (f": {known}" if known else "")]
    if driven and 0 < ended < sweep.trials:
        lines.append(f"about {hours / ended * (sweep.trials - ended):.2f} hours to go at this pace")
    lines += [each.line for each in standings(sweep, records, hours, stored_bytes) if each.line]
    best = best_record(records)
    if best is not None and best.value is not None:
        lines.append(f"best so far: trial {best.number}, {sweep.objective} {best.value:.4f}")
    if why := why_over(sweep, records, hours, stored_bytes):
        lines.append(why)
    elif not driven and ended < sweep.trials:
        lines.append("stopped: no process runs this sweep; the command that began it goes on with it")
    return lines


def outcome_word(outcome: Outcome, *, driven: bool) -> str:
    """A trial's outcome in a word: without a driver nothing runs."""
    return "interrupted" if outcome is Outcome.RUNNING and not driven else str(outcome)
