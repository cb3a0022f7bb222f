"""The storage of a sweep's trials: checkpoints of ended ones are deleted as it goes, the study has a backup there."""

import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import tune

from inflora.errors import one_line
from inflora.storage import SharedFolder
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.records import Outcome, best_record, trial_name
from sweeps.engine.ledger.snapshot import fetch_database, keep_database
from sweeps.engine.ledger.study import STUDY_FILE
from sweeps.engine.run.preflight import TRIALS
from sweeps.engine.show.mlflow_store import own_database

logger = logging.getLogger(__name__)


class CheckpointCleanup(tune.Callback):
    """Deletes what no trial will go on from, when a trial ends, and tells the ledger how much room the rest takes."""

    def __init__(self, ledger: Ledger, place: SharedFolder) -> None:
        self.ledger, self.place = ledger, place

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.tidy()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.tidy()

    def tidy(self) -> None:
        """Delete the states of ended trials but of the one that has scored highest.

        Its own score, which later trials do not change: what is deleted cannot become the one to keep.
        """
        records, study_name = self.ledger.records(), self.ledger.sweep.study_name
        best = best_record(records)
        ended = {r.number for r in records if r.outcome is not Outcome.RUNNING and r is not best}
        for name in self.place.folders(TRIALS) & {trial_name(study_name, number) for number in ended}:
            self.place.discard(f"{TRIALS}/{name}")
        # Measured here and not at every report: a bucket is asked for each of its files.
        self.ledger.measure_storage(self.place.bytes_in(TRIALS))


class StudyBackup(tune.Callback):
    """Keeps a copy of the study where the trials are: a head that is lost takes only its running trials along."""

    def __init__(self, folder: Path, place: SharedFolder) -> None:
        self.folder, self.place = folder, place

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        try:
            keep_database(self.folder / STUDY_FILE, self.place)
        except OSError as error:  # the next trial's end is the next try
            logger.warning("the study could not be kept in %s: %s", self.place.address, error)


@contextmanager
def mlflow_kept(uri: str, folder: Path, place: SharedFolder, say: Callable[[str], None]) -> Iterator[None]:
    """Begin with the copy of the sweep's own MLflow database that the place has, and leave one there at the end.

    For whoever looks at it there, and for a head that goes on elsewhere. What is lost of it is shown anew: the study
    has everything.
    """
    own = own_database(uri, folder)
    if own is None or place.address == str(folder):
        yield
        return
    fetch_database(own, place)
    try:
        yield
    finally:
        try:
            if own.exists():
                keep_database(own, place)
        except (OSError, sqlite3.Error) as error:
            say(f"MLflow's database could not be copied to {place.address}: {one_line(str(error), 200)}")
