"""The place of a sweep's trials, as its driver keeps it: the study has a copy there, what nobody needs is deleted."""

import logging
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna

from inflora.config import ConfigError
from inflora.errors import one_line
from inflora.patience import patiently
from inflora.storage import SharedFolder
from sweeps.engine.ledger.database import STUDY_FILE, URL_FILE, file_of, study_url
from sweeps.engine.ledger.lease import ReplacedError, require_ours
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.reading import read_kept
from sweeps.engine.ledger.records import Outcome, TrialRecord, best_record, old_trial_name, trial_name
from sweeps.engine.ledger.snapshot import fetch_database, keep_database
from sweeps.engine.ledger.study import check_study
from sweeps.engine.ledger.trials import read_records
from sweeps.engine.run.preflight import TRIALS
from sweeps.engine.show.mlflow_store import own_database
from sweeps.engine.show.progress import Callback
from sweeps.engine.space.spec import SPEC_FILE, Sweep

logger = logging.getLogger(__name__)

LAST_COPY_PATIENCE_S = 300.0
"""The time for which the last copy of a study is tried."""


class Housekeeping(Callback):
    """Looks after the place when a trial ends, and tells the ledger how much room it takes.

    The study is copied first, then states are deleted: to a head that has only the copy, a trial that is not known to
    have ended goes on from its state. What fails while the place is away is done at the next trial's end.
    """

    def __init__(self, ledger: Ledger, folder: Path, place: SharedFolder) -> None:
        self.ledger, self.folder, self.place = ledger, folder, place
        self._was_away = False

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.tidy()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.tidy()

    def tidy(self) -> None:
        """Copy, delete, measure; only the ledger's own failure is raised, as Tune ends with a callback that raises."""
        try:
            self.place.require()
            copy_study(self.folder, self.place)
            self._delete(self.place.folders(TRIALS))
            # Measured here and not at every report: a bucket is asked for each of its files.
            stored_bytes = self.place.bytes_in(TRIALS)
        except (OSError, sqlite3.Error, ReplacedError) as error:
            if not self._was_away:
                logger.warning("%s cannot be looked after now: %s", self.place.address, one_line(str(error), 300))
            self._was_away = True
            return
        self._was_away = False
        self.ledger.measure_storage(stored_bytes)

    def _delete(self, there: set[str]) -> None:
        """Delete the states of the study's trials but of those that run and of the one that has scored highest.

        Its own score, which later trials do not change: what is deleted cannot become the one to keep.
        """
        sweep, records = self.ledger.sweep, self.ledger.records()
        running = [each for each in records if each.outcome is Outcome.RUNNING and sweep.config_or_none(each.settings)]
        kept = {state_of(sweep, record) for record in running}
        best = best_record(records)
        if best is not None:
            kept |= {state_of(sweep, best), old_trial_name(sweep.study_name, best.number)}
        for name in there - kept:
            if name.startswith(f"{sweep.study_name}-"):
                self.place.discard(f"{TRIALS}/{name}")


def state_of(sweep: Sweep, record: TrialRecord) -> str:
    """The name of the folder of a trial's state."""
    return trial_name(sweep.study_name, record.number, sweep.config(record.settings))


def begun_anew(sweep: Sweep, records: Sequence[TrialRecord], place: SharedFolder) -> list[int]:
    """The interrupted trials whose states are kept as earlier versions did, so that nobody knows of which settings."""
    running = {old_trial_name(sweep.study_name, r.number): r.number for r in records if r.outcome is Outcome.RUNNING}
    return sorted(running[name] for name in place.folders(TRIALS) & set(running))


def take_newer(sweep: Sweep, folder: Path, place: SharedFolder) -> bool:
    """Take the copy of the study in the place where it has gone on from the one in ``folder``; whether that was done.

    So it has when this machine lost power, and with it the last writes, or when another head went on meanwhile.

    Raises:
        ConfigError: Both have gone on, and this one would write over the other.
    """
    url = study_url(folder)
    study, file = check_study(sweep, url), file_of(url)
    if study is None or place.address == str(folder) or file is None:
        return False
    try:
        copy = read_kept(place.address).study
    except ConfigError:
        return False  # there is none yet, or a damaged one, which is written anew
    ours, theirs = _ended(study), _ended(copy)
    elsewhere = theirs.keys() - ours.keys()
    if elsewhere and any(theirs.get(number) != end for number, end in ours.items()):
        raise ConfigError(
            f"another head has gone on with the study in {place.address}: of trials {sorted(elsewhere)} {folder} does "
            "not know the end, and it knows ends that are not there; remove that folder to go on with the study in the "
            "shared place"
        )
    return bool(elsewhere) and fetch_database(file, place, replace=True)


def _ended(study: optuna.Study) -> dict[int, tuple[dict[str, Any], int | None]]:
    """Settings and end of the trials that have ended."""
    records = read_records(study)
    return {r.number: (r.settings, r.end_ms) for r in records if r.outcome is not Outcome.RUNNING}


def copy_study(folder: Path, place: SharedFolder) -> None:
    """Copy the sweep and its study, or the address of that, to the trials' place, unless that is its own folder.

    Raises:
        OSError: The place is away.
        ReplacedError: Another driver holds it by now, whose study must not be written over.
    """
    if place.address == str(folder):
        return
    require_ours(place)
    place.write(SPEC_FILE, (folder / SPEC_FILE).read_bytes())
    if (folder / URL_FILE).exists():
        place.write(URL_FILE, (folder / URL_FILE).read_bytes())
    else:
        keep_database(folder / STUDY_FILE, place)


def copy_study_at_last(folder: Path, place: SharedFolder, say: Callable[[str], None]) -> bool:
    """Copy the study as it is at the end; what cannot be is said, as the trials are all in ``folder``.

    False where another driver has taken the place over.
    """
    try:
        patiently(
            LAST_COPY_PATIENCE_S,
            lambda: copy_study(folder, place),
            lambda why: say(f"the study cannot be copied to {place.address}: {one_line(why, 300)} (Ctrl-C: no longer)"),
        )
    except (OSError, sqlite3.Error, ReplacedError) as error:
        say(
            f"the study in {place.address} is not as this sweep has ended ({one_line(str(error), 200)}); {folder} has "
            "all of it, and the same command copies it"
        )
        return not isinstance(error, ReplacedError)
    return True


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
    place.when_there(lambda: fetch_database(own, place))
    try:
        yield
    finally:
        try:
            if own.exists():
                require_ours(place)
                keep_database(own, place)
        except (OSError, sqlite3.Error, ReplacedError) as error:
            say(f"MLflow's database could not be copied to {place.address}: {one_line(str(error), 200)}")
