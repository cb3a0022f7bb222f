"""The lines that say how far a sweep is: on a terminal, in ``sweeps status``, on the report's page."""

from collections.abc import Sequence

import optuna

from inflora.errors import one_line
from sweeps.engine.ledger import trials as kept
from sweeps.engine.ledger.bill import Bill
from sweeps.engine.ledger.records import Outcome, TrialRecord, Waiting
from sweeps.engine.space.budget import standings, why_over
from sweeps.engine.space.estimate import ENOUGH, NEXT, Estimates, winner
from sweeps.engine.space.spec import Sweep

_LONGEST = 500
"""Of a line whose words are not this program's own."""


def status_lines(
    sweep: Sweep,
    records: Sequence[TrialRecord],
    known: Estimates | None,
    hours: float,
    stored_bytes: int,
    *,
    waiting: Waiting | None = None,
    bill: Bill | None = None,
    driven: bool = True,
) -> list[str]:
    """A line each for the trials, those that wait, every budget, cost, the setting to train, why nothing more comes.

    ``known`` is what the trials say of the scores. ``driven``: a driver is alive; without one what runs was
    interrupted, and nothing goes on by itself.
    """
    count = {outcome: sum(record.outcome is outcome for record in records) for outcome in Outcome}
    ended = len(records) - count[Outcome.RUNNING]
    outcomes = ", ".join(f"{number} {outcome_word(each, driven=driven)}" for each, number in count.items() if number)
    lines = [f"{ended} of {sweep.trials} trials ended" + (f": {outcomes}" if outcomes else "")]
    if driven and waiting is not None:
        lines.append(one_line(waiting.line, _LONGEST))
    if driven and 0 < ended < sweep.trials:
        lines.append(f"about {hours / ended * (sweep.trials - ended):.2f} hours to go at this pace")
    lines += [each.line for each in standings(sweep, records, hours, stored_bytes) if each.line]
    lines += [bill.line] if bill is not None and bill.line else []
    lines += [line for line in (best_line(sweep, records, known), gain_line(known)) if line]
    if why := why_over(sweep, records, hours, stored_bytes):
        lines.append(why)
    elif not driven and ended < sweep.trials:
        lines.append("stopped: no process runs this sweep; the command that began it goes on with it")
    return lines


def study_lines(
    sweep: Sweep, study: optuna.Study, records: Sequence[TrialRecord], known: Estimates | None, *, driven: bool
) -> list[str]:
    """``status_lines`` of a sweep that is read: all that its study keeps beside trials."""
    return status_lines(
        sweep,
        records,
        known,
        kept.hours_so_far(study),
        kept.stored_bytes(study),
        waiting=kept.waiting(study),
        bill=kept.bill_so_far(study),
        driven=driven,
    )


def trial_lines(records: Sequence[TrialRecord], *, driven: bool) -> list[str]:
    """A line for every trial that failed, with why, and for every one that runs; each with the place of its log."""
    lines = []
    for record in records:
        tries = f" ({len(record.tries)} tries)" if len(record.tries) > 1 else ""
        log = f"log {record.log}" if record.log else ""
        if record.outcome is Outcome.FAILED:
            lines.append(f"trial {record.number} failed{tries}: {'; '.join(filter(None, (record.reason, log)))}")
        elif record.outcome is Outcome.RUNNING and log:
            lines.append(f"trial {record.number} {outcome_word(record.outcome, driven=driven)}{tries}: {log}")
    return [one_line(line, 2 * _LONGEST) for line in lines]


def best_line(sweep: Sweep, records: Sequence[TrialRecord], known: Estimates | None) -> str:
    """The setting to train, with its estimated score and its own; empty while there is none."""
    best = winner(records, known)
    if best is None or best.value is None:
        return ""
    if known is None:
        return f"best so far: trial {best.number}, {sweep.objective} {best.value:.4f}"
    told = known.of_trials()[best.number]
    return (
        f"best so far: trial {best.number}, {sweep.objective} estimated {told.mean:.4f} ({told.low:.4f} to "
        f"{told.high:.4f}), observed {best.value:.4f}"
    )


def gain_line(known: Estimates | None) -> str:
    """What more trials are expected to add, in points; empty where too few are known to tell."""
    if known is None or len(known.finished) < ENOUGH:
        return ""
    return f"the next {NEXT} trials are expected to add {100 * known.expected_gain():.2f} points"


def outcome_word(outcome: Outcome, *, driven: bool) -> str:
    """A trial's outcome in a word: without a driver nothing runs."""
    return "interrupted" if outcome is Outcome.RUNNING and not driven else str(outcome)
