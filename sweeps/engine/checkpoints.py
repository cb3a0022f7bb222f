"""The room that trials take: states of ended ones are deleted as the sweep goes, the best one's stays."""

from typing import Any

from ray import tune

from inflora.storage import SharedFolder
from sweeps.engine.ledger import Ledger
from sweeps.engine.records import Outcome, best_record, trial_name

TRIALS = "trials"
"""Where the states of a sweep's trials are in its shared place, a folder each."""

SHARED = "shared"
"""Where what their first tasks have in common is, in the same place."""


class Housekeeping(tune.Callback):
    """Deletes what no trial will go on from, when a trial ends; ends the sweep where it still needs too much room."""

    def __init__(self, ledger: Ledger, place: SharedFolder) -> None:
        self.ledger, self.place = ledger, place

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.tidy()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.tidy()

    def tidy(self) -> None:
        """Delete the states of ended trials but the best one's; a worker that is being stopped may write once more."""
        records, study_name = self.ledger.records(), self.ledger.sweep.study_name
        best = best_record(records)
        ended = {r.number for r in records if r.outcome is not Outcome.RUNNING and r is not best}
        for name in self.place.folders(TRIALS) & {trial_name(study_name, number) for number in ended}:
            self.place.discard(f"{TRIALS}/{name}")
        bound = self.ledger.sweep.budget.storage_gb
        if bound is None:
            return
        if self._used_gb() > bound:
            self.place.discard(SHARED)  # only time is lost with it
        if (used := self._used_gb()) > bound:
            self.ledger.end_early(f"storage budget spent: {used:.2f} of {bound:g} GB in {self.place.address}")

    def _used_gb(self) -> float:
        return (self.place.bytes_in(TRIALS) + self.place.bytes_in(SHARED)) / 1e9
