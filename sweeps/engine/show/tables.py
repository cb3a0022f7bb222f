"""A sweep's trials as a table: in the terminal, as CSV, for a paper."""

import csv
import io
from collections.abc import Container
from typing import Any

from rich.console import Console
from rich.table import Table

from sweeps.engine.ledger.records import TrialRecord
from sweeps.engine.show.status import outcome_word
from sweeps.engine.space.estimate import Estimates, best_estimated_first, winners
from sweeps.engine.space.spec import Sweep


def trials_table(
    sweep: Sweep,
    records: list[TrialRecord],
    known: Estimates | None = None,
    front: Container[int] = (),
    *,
    driven: bool = True,
) -> Table:
    """All trials, the best estimate first; those on the Pareto front are starred."""
    table = Table(title=f"{sweep.name}: {len(records)} trials, judged on validation images")
    estimates = known.of_trials() if known else {}
    estimated = ["estimate"] if known else []
    for column in ("trial", "outcome", "tasks", *sweep.space, *sweep.objectives, *estimated, "seconds"):
        table.add_column(column, justify="left" if column == "outcome" else "right", no_wrap=column == "estimate")
    for record in best_estimated_first(records, known):
        values = [_short(record.settings.get(path, "")) for path in sweep.space]
        objectives = [_short(value, 4) for value in record.values] or [""] * len(sweep.objectives)
        objectives += [str(estimates.get(record.number, "")) for _ in estimated]
        seconds = sum(report.seconds for report in record.reports)
        number = f"{'* ' if record.number in front else ''}{record.number}"
        outcome = outcome_word(record.outcome, driven=driven)
        outcome += f", breaks {', '.join(record.broken)}" if record.broken else ""
        table.add_row(number, outcome, str(len(record.reports)), *values, *objectives, f"{seconds:.0f}")
    if front:
        table.caption = "* on the Pareto front"
    return table


def csv_table(sweep: Sweep, records: list[TrialRecord], known: Estimates | None = None) -> str:
    """All trials, the best estimate first, with every digit."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    estimates = known.of_trials() if known else {}
    estimated = [] if sweep.tradeoffs else ["estimate/mean", "estimate/low", "estimate/high"]
    writer.writerow(["trial", "outcome", "tasks", *sweep.space, *sweep.objectives, *estimated, "seconds", "reason"])
    for record in best_estimated_first(records, known):
        settings = [record.settings.get(path, "") for path in sweep.space]
        values: list[Any] = list(record.values) or [""] * len(sweep.objectives)
        values += estimates.get(record.number, [""] * len(estimated))
        seconds = sum(report.seconds for report in record.reports)
        cells = [record.number, record.outcome, len(record.reports), *settings, *values, round(seconds, 3)]
        writer.writerow([*cells, record.reason])
    return text.getvalue()


def latex_table(sweep: Sweep, records: list[TrialRecord], known: Estimates | None = None) -> str:
    """The finished trials, the best estimate first, for a document that uses booktabs."""
    head = ["trial", *sweep.space, *sweep.objectives, *(["estimate"] if known else [])]
    estimates = known.of_trials() if known else {}
    rows = [
        [str(record.number), *(_short(record.settings.get(path, "")) for path in sweep.space)]
        + [_short(value, 4) for value in record.values]
        + ([str(estimates[record.number])] if known else [])
        for record in winners(records, known)
    ]
    lines = [" & ".join(map(_escaped, row)).replace("\u00b1", r"$\pm$") + r" \\" for row in [head, *rows]]
    note = f"% {sweep.name}: {len(rows)} finished of {len(records)} trials, judged on validation images"
    columns = "r" * len(head)
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([note, *body, r"\end{tabular}", ""])


def _escaped(text: str) -> str:
    """As TeX prints it."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(sign, f"\\{sign}" if sign in "&%$#_{}" else sign) for sign in text)


def _short(value: Any, decimals: int | None = None) -> str:
    """A number as a cell shows it."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if decimals is None or abs(value) >= 10 else f"{value:.{decimals}f}"


def print_table(table: Table) -> None:
    """As wide as the terminal; wide enough for every column where there is none."""
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)
