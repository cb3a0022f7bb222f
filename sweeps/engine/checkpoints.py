"""The room that a sweep takes on its storage: states of ended trials go as the sweep goes, the best one's stays."""

import shutil
from pathlib import Path
from typing import Any

from ray import tune

from sweeps.engine.ledger import Ledger
from sweeps.engine.records import Outcome, best_record, trial_name


def trials_folder(folder: Path) -> Path:
    """Where the states of a sweep's trials are, a folder each."""
    return folder / "trials"


def bytes_in(folder: Path) -> int:
    """The bytes of all files below ``folder``."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue  # gone while we looked
    return total


class Housekeeping(tune.Callback):
    """Deletes what no trial will go on from, when a trial ends; ends the sweep where it still needs too much room."""

    def __init__(self, ledger: Ledger, folder: Path) -> None:
        self.ledger, self.folder = ledger, trials_folder(folder)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.tidy()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.tidy()

    def tidy(self) -> None:
        """Delete the states of ended trials but the best one's; a worker that is being stopped may write once more."""
        records = self.ledger.records()
        best = best_record(records)
        for record in records:
            if record.outcome is not Outcome.RUNNING and record is not best:
                shutil.rmtree(self.folder / trial_name(self.ledger.sweep.study_name, record.number), ignore_errors=True)
        bound = self.ledger.sweep.budget.storage_gb
        if bound is not None and (used := bytes_in(self.folder) / 1e9) > bound:
            self.ledger.end_early(f"storage budget spent: {used:.2f} of {bound:g} GB in {self.folder}")
