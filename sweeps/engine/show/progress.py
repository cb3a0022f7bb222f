"""A sweep's progress while it runs: one live table on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ray import tune
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.records import Outcome, TrialRecord, describe
from sweeps.engine.show.status import status_lines
from sweeps.engine.space.estimate import estimate

_FRAME = 7
"""Lines of a table that are no rows: title, header, borders, caption."""


class Callback(tune.Callback):
    """A callback of which Tune keeps nothing, though it pickles all of them: the study is the state."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class ProgressLines(Callback):
    """A line when a trial starts, has learnt a task, or ends."""

    def __init__(self, ledger: Ledger, say: Callable[[str], None]) -> None:
        self.ledger, self.say = ledger, say

    def shown(self, console: Console) -> AbstractContextManager[Any]:
        """While this is entered the progress is shown."""
        return nullcontext()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self.ledger.record_of(trial.config["number"])
        self.say(f"trial {record.number:3d} starts  {describe(record.settings)}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        number = trial.config["number"]
        if "notice" in result:
            # On stderr, so that it is seen above a live table too.
            print(f"trial {number:3d} begins again: {result['notice']}", file=sys.stderr, flush=True)
        if "tasks_done" in result:
            self.say(f"trial {number:3d} task {result['tasks_done']}  acc/seen {100 * result['acc/seen']:.1f} %")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say_outcome(self.ledger.record_of(trial.config["number"]))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say_outcome(self.ledger.record_of(trial.config["number"]))

    def _say_outcome(self, record: TrialRecord) -> None:
        if record.outcome is Outcome.RUNNING:
            if record.again:
                self.say(f"trial {record.number:3d} failed, is tried again {record.again}: {record.tries[-1].reason}")
            return
        ended = [r for r in self.ledger.records() if r.outcome is not Outcome.RUNNING]
        value = f"  {self.ledger.sweep.objective} {100 * record.value:.1f} %" if record.value is not None else ""
        reason = f"  {record.reason}" if record.reason else ""
        self.say(f"trial {record.number:3d} {record.outcome}{value}{reason}  ({len(ended)}/{self.ledger.sweep.trials})")


class LiveTable(ProgressLines):
    """On a terminal: what runs and what ended last in one table that is drawn again, and where the sweep stands."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger, lambda line: None)

    def shown(self, console: Console) -> AbstractContextManager[Any]:
        """The table, until this is left."""
        return Live(console=console, get_renderable=lambda: self.draw(console.height), refresh_per_second=2)

    def draw(self, height: int) -> Group:
        """The table as it stands, in so many lines that the last ones, where the sweep stands, are seen too."""
        records, sweep = self.ledger.records(), self.ledger.sweep
        running = [record for record in records if record.outcome is Outcome.RUNNING]
        ended = sorted((r for r in records if r.outcome is not Outcome.RUNNING), key=lambda r: r.end_ms or 0)
        known = estimate(sweep, records, self.ledger.images)
        estimates = known.of_trials() if known else {}
        table = Table(title=sweep.name)
        for column in ("trial", "outcome", "tasks", "acc/seen", sweep.objective, "estimate", "settings"):
            justify: Any = "left" if column in ("outcome", "settings") else "right"
            table.add_column(column, justify=justify, no_wrap=column == "estimate")
        used = self.ledger.hours(), self.ledger.stored_bytes
        lines = status_lines(sweep, records, known, *used, waiting=self.ledger.waiting, bill=self.ledger.bill)
        shown = [*ended[-5:], *running]
        room = max(1, height - len(lines) - _FRAME)
        left = max(0, len(shown) - room)
        for record in shown[:room]:
            last = record.reports[-1] if record.reports else None
            seen = f"{100 * last.metrics['acc/seen']:.1f}" if last else ""
            tasks = f"{last.tasks_done}/{last.tasks}" if last else ""
            value = f"{record.value:.4f}" if record.value is not None else ""
            settings = Text(describe(record.settings), no_wrap=True, overflow="ellipsis")  # a line for each trial
            told = str(estimates.get(record.number, ""))
            table.add_row(str(record.number), record.outcome, tasks, seen, value, told, settings)
        if left:
            table.caption = f"and {left} more that run"
        return Group(table, Text("\n".join(lines)))


def progress_on(console: Console, ledger: Ledger, say: Callable[[str], None]) -> ProgressLines:
    """The table where it can be drawn again, lines elsewhere: into a pipe, or on a terminal that only prints."""
    return LiveTable(ledger) if console.is_interactive else ProgressLines(ledger, say)
