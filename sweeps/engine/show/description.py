"""What a sweep has found, and what became of a trial, in Markdown: MLflow shows it on a run's page."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from inflora.errors import one_line
from sweeps.engine.ledger.records import Outcome, TrialRecord, describe, ranking
from sweeps.engine.space.estimate import Estimates, winners
from sweeps.engine.space.spec import Sweep

NOTE = "mlflow.note.content"
"""The tag that MLflow shows as a run's or an experiment's description."""

LONGEST = 8_000
"""The characters that MLflow takes of a tag."""

_TOP = 5
_CELL = 60
_LINE = 600
_SIGNS = re.compile(r"[\\`*<>&@|~\[\]]|\b_|_\b|:(?=\S+:)")
"""What Markdown would take for more than itself; MLflow's also makes links of ``@name``, pictures of ``:name:``."""

_GAP = "&ensp;"
"""Between columns, where MLflow leaves no room."""

Cell = Callable[[TrialRecord], str]


def description(
    sweep: Sweep, records: Sequence[TrialRecord], known: Estimates | None, export: str = "", ending: str = ""
) -> str:
    """A sweep so far: what to train, how far it is, how to go on from here, its best trials.

    ``known`` are the estimates of its finished trials; ``export`` is the command that writes the best trial's config,
    ``ending`` says why no trial runs any more. The text changes when a trial has ended, and not with every task.
    """
    best = winners(records, known)[:_TOP]
    parts = [_decision(sweep, records, best, known), _state(sweep, records), ending]
    parts += [f"Export it:\n\n```\n{export}\n```"] if best and export else []
    parts.append("The whole report is the artifact `report.html`, there as soon as the sweep ends.")
    parts += [f"The best {len(best)}:\n\n{_table(columns(sweep, known), best)}"] if len(best) > 1 else []
    return within_limit("\n\n".join(part for part in parts if part))


def trial_note(sweep: Sweep, record: TrialRecord) -> str:
    """A trial in a line: its settings, and once it has ended its outcome and why."""
    settings = code(describe(record.settings))
    if record.outcome is Outcome.RUNNING:
        return within_limit(settings)
    scores = ", ".join(f"{name} {value:.4f}" for name, value in zip(sweep.objectives, record.values, strict=False))
    broken = f"breaks {', '.join(record.broken)}" if record.broken else ""
    told = ", ".join(part for part in (scores, broken, record.reason) if part)
    return within_limit(f"{settings}: {record.outcome}" + (f", {plain(told)}" if told else ""))


def columns(sweep: Sweep, known: Estimates | None) -> dict[str, Cell]:
    """The table's columns: each one's title, and what it says of a trial."""
    estimated = known.of_trials() if known else {}
    estimates: dict[str, Cell] = {"estimated": lambda record: str(estimated[record.number])} if known else {}
    scores = {code(name): _score(index) for index, name in enumerate(sweep.objectives)}
    settings = {code(path): _setting(path) for path in sweep.space}
    return {"trial": lambda record: str(record.number), **estimates, **scores, **settings}


def _decision(
    sweep: Sweep, records: Sequence[TrialRecord], best: Sequence[TrialRecord], known: Estimates | None
) -> str:
    if not best:
        return "**No trial has finished yet.**"
    winner = best[0]
    finished = sum(record.outcome is Outcome.FINISHED for record in records)
    score = f"{sweep.objective} {winner.value:.4f} on validation images"
    score += f", estimated {known.of_trials()[winner.number]}" if known else ""
    trials = "trial" if finished == 1 else "trials"
    line = f"**Train with trial {winner.number}**: {score}, the best of {finished} finished {trials}"
    first = next((r for r in ranking(records) if sweep.first and r.settings == dict(sweep.first[0])), None)
    if first is not None and first is not winner:
        line += f" (the recipe's first setting: {first.value:.4f})"
    return f"{line}\n\n{code(describe(winner.settings))}"


def _state(sweep: Sweep, records: Sequence[TrialRecord]) -> str:
    count = Counter(record.outcome for record in records)
    ended = len(records) - count[Outcome.RUNNING]
    known = ", ".join(f"{count[each]} {each}" for each in Outcome if count[each] and each is not Outcome.RUNNING)
    return f"{ended} of {sweep.trials} trials have ended" + (f": {known}." if known else ".")


def _table(shown: dict[str, Cell], records: Sequence[TrialRecord]) -> str:
    cells = [list(shown)] + [[cell(record) for cell in shown.values()] for record in records]
    head, *rows = [f"| {f'{_GAP} | '.join(row)} |" for row in cells]
    return "\n".join([head, "|---" * len(shown) + "|", *rows])


def _score(index: int) -> Cell:
    return lambda record: f"{record.values[index]:.4f}" if index < len(record.values) else ""


def _setting(path: str) -> Cell:
    return lambda record: _value(record.settings.get(path, ""))


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else plain(str(value), _CELL)


def plain(text: str, longest: int = _LINE) -> str:
    """Text on one line that Markdown shows as it is."""
    return _SIGNS.sub(lambda sign: f"&#{ord(sign[0])};", one_line(text, longest))


def code(text: str) -> str:
    """Text on one line, as code; a bar would end a table's cell."""
    line = one_line(text, _LINE).replace("`", "'").replace("|", "\\|")
    return f"`{line}`" if line else ""


def within_limit(text: str) -> str:
    """The lines that fit into a tag; of a single one, its beginning."""
    if len(text) <= LONGEST:
        return text
    kept = text[: LONGEST - 5]
    return (kept.rpartition("\n")[0] or kept) + "\n\n..."
