"""A sweep's trials as a table in the terminal."""

from collections.abc import Container
from typing import Any

from rich.console import Console
from rich.table import Table

from sweeps.engine.records import TrialRecord, best_first
from sweeps.engine.spec import Sweep


def trials_table(sweep: Sweep, records: list[TrialRecord], front: Container[int] = ()) -> Table:
    """All trials, the best finished one first; those on the Pareto front are starred."""
    table = Table(title=f"{sweep.name}: {len(records)} trials, judged on validation images")
    for column in ("trial", "outcome", "tasks", *sweep.space, *sweep.objectives, "seconds"):
        table.add_column(column, justify="left" if column == "outcome" else "right")
    for record in best_first(records):
        values = [_short(record.settings.get(path, "")) for path in sweep.space]
        objectives = [_short(value, 4) for value in record.values] or [""] * len(sweep.objectives)
        seconds = sum(report.seconds for report in record.reports)
        number = f"{'* ' if record.number in front else ''}{record.number}"
        outcome = f"{record.outcome}, breaks {', '.join(record.broken)}" if record.broken else record.outcome
        table.add_row(number, outcome, str(len(record.reports)), *values, *objectives, f"{seconds:.0f}")
    if front:
        table.caption = "* on the Pareto front"
    return table


def _short(value: Any, decimals: int | None = None) -> str:
    """A number as a cell shows it."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if decimals is None or abs(value) >= 10 else f"{value:.{decimals}f}"


def print_table(table: Table) -> None:
    """As wide as the terminal; wide enough for every column where there is none."""
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)
