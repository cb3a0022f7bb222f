"""Start a sweep, or go on with one: the Tuner around the ledger."""

import fcntl
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import ray
from ray import tune
from rich.console import Console

from inflora.config import ConfigError
from inflora.continual import check, identity
from inflora.files import write_atomically
from inflora.patience import NoAnswerError, within
from inflora.storage import SharedFolder
from sweeps.engine.checkpoints import SHARED, TRIALS, Housekeeping
from sweeps.engine.cluster import (
    DRIVER,
    THIS_MACHINE,
    Cluster,
    check_state_api,
    connect,
    require_gpus,
    trials_at_a_time,
)
from sweeps.engine.driver import pick_backend, train_driver
from sweeps.engine.ledger import Ledger
from sweeps.engine.mlflow_store import git_commit
from sweeps.engine.nodes import check_nodes
from sweeps.engine.output import check_folder_for
from sweeps.engine.progress import progress_on
from sweeps.engine.reach import PATIENCE_S, reachable_ray, reachable_store
from sweeps.engine.records import TrialRecord
from sweeps.engine.search import StudyScheduler, StudySearcher
from sweeps.engine.snapshot import LOCK_FILE, is_driven
from sweeps.engine.spec import SPEC_FILE, Sweep, read_sweep
from sweeps.engine.study import STUDY_FILE, check_study, is_over
from sweeps.engine.study_backup import fetch_database, keep_database
from sweeps.engine.tracking import Tracker
from sweeps.engine.trial import inline_trial

logger = logging.getLogger(__name__)


class SweepResult(NamedTuple):
    """What is there when a sweep stops: all trials, whether none is left to run, whether MLflow has everything.

    ``over`` says why it ended before all trials that were asked for; empty if all were done, or if it was interrupted.
    """

    records: list[TrialRecord]
    complete: bool
    delivered: bool
    over: str


def run_sweep(
    sweep: Sweep,
    folder: Path,
    tracking_uri: str,
    *,
    cluster: Cluster = THIS_MACHINE,
    say: Callable[[str], None],
    warm_start: tuple[Sequence[Mapping[str, Any]], str] | None = None,
) -> SweepResult:
    """Run what is left of a sweep's trials.

    ``warm_start`` are settings to try first and where they come from.

    Raises:
        ConfigError: Before anything is made or started: settings, data, backbone, folder, addresses or resources that
            do not fit. After the first trials: all have failed for one reason.
    """
    require_gpus(sweep.resources, cluster.address)
    for config in sweep.corners():
        check(config)
    folder = folder.absolute()
    place = trials_place(sweep, folder, cluster)
    check_folder(sweep, folder)
    check_tracking(tracking_uri, folder, say)
    known = identity(sweep.base)  # reads the weights, which may have to be fetched: before anything is made
    try:
        at_a_time = 0 if is_over(sweep, folder) else find_room(sweep, cluster, say)
        return _run_claimed(sweep, folder, place, tracking_uri, cluster, at_a_time, say, warm_start, known)
    finally:
        ray.shutdown()


def check_tracking(uri: str, folder: Path, say: Callable[[str], None]) -> None:
    """Raise ConfigError unless the tracking store answers; a sweep that has begun goes on without it, and says so."""
    try:
        reachable_store(uri, folder)
    except ConfigError as error:
        if not (folder / STUDY_FILE).exists():
            raise
        say(f"{error}; trials go on, and what it misses is sent when it answers")


def find_room(sweep: Sweep, cluster: Cluster, say: Callable[[str], None]) -> int:
    """Connect to the cluster; how many trials it takes at a time.

    Raises:
        ConfigError: There is none, or it has no room for a single trial.
    """
    reachable_ray(cluster.address)
    connect(cluster.address, say)
    at_a_time = trials_at_a_time(sweep.resources, say)
    if sweep.executor == "train":
        check_state_api()
    return cluster.at_a_time or at_a_time


def _run_claimed(
    sweep: Sweep,
    folder: Path,
    place: SharedFolder,
    tracking_uri: str,
    cluster: Cluster,
    at_a_time: int,
    say: Callable[[str], None],
    warm_start: tuple[Sequence[Mapping[str, Any]], str] | None,
    known: Mapping[str, str],
) -> SweepResult:
    """Run what is left, ``at_a_time`` trials side by side, as the only driver of the sweep in ``folder``.

    ``known`` is the base's identity, recorded with every trial.
    """
    with claimed(sweep, folder):
        if fetch_database(folder / STUDY_FILE, place):
            say(f"sweep {sweep.name}: the study is the one kept in {place.address}")
        ledger = Ledger(sweep, folder)
        if warm_start is not None:
            found = ledger.warm_start(*warm_start)
            say(f"warm start: {found} settings of {warm_start[1]} lie in this space and are tried first")
        remaining = 0 if ledger.why_over() else ledger.remaining()
        done = sweep.trials - ledger.remaining()
        say(f"sweep {sweep.name}: {remaining} trials to run" + (f", {done} done before" if done > 0 else ""))
        commit = git_commit()
        tags = dict(known) | ({"mlflow.source.git.commit": commit} if commit else {})
        if remaining:
            check_nodes(place)
        tracker = Tracker(sweep, folder, tracking_uri, tags)
        tracker.start()
        try:
            if remaining:
                _run_trials(sweep, folder, place, ledger, min(at_a_time, remaining), say)
        finally:
            over = ledger.why_over()
            complete = ledger.remaining() == 0 or bool(over)
            ray.shutdown()
            if cluster.shared:
                keep_database(folder / STUDY_FILE, place)
            delivered = tracker.close(complete=complete, over=over)
        if hopeless := ledger.why_hopeless():
            raise ConfigError(hopeless)
        return SweepResult(ledger.records(), complete, delivered, over)


def trials_place(sweep: Sweep, folder: Path, cluster: Cluster) -> SharedFolder:
    """Where the trials of a sweep in ``folder`` are kept.

    Raises:
        ConfigError: Not a place that the sweep's executor can keep them in, or one that does not answer.
    """
    place = SharedFolder(f"{cluster.shared}/{sweep.name}" if cluster.shared else str(folder))
    if sweep.executor == "inline" and not place.is_local:
        raise ConfigError(f"executor inline keeps its trials in a folder, --shared must be one, got {place.address}")
    if not place.is_local:
        try:
            within(2 * PATIENCE_S, lambda: place.read(STUDY_FILE))
        except NoAnswerError as error:
            raise ConfigError(f"--shared {place.address} {error}") from None
    return place


@contextmanager
def claimed(sweep: Sweep, folder: Path) -> Iterator[None]:
    """Hold a sweep's folder: one driver at a time, one study per folder.

    Raises:
        ConfigError: Another driver is at work there, or another sweep was run there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_FILE).open("w")
    except OSError as error:
        raise ConfigError(f"cannot write into {folder}: {error.strerror}") from None
    with lock:
        if not _held(lock):
            raise ConfigError(f"the sweep in {folder} is being run by another process")
        check_spec(sweep, folder)
        write_atomically(folder / SPEC_FILE, sweep.model_dump_json(indent=2).encode())
        yield


def _held(lock: IO[str]) -> bool:
    """Take a lock that no driver holds; one who only asks for drivers holds it for a moment."""
    for _ in range(10):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(0.05)
        else:
            return True
    return False


def check_folder(sweep: Sweep, folder: Path) -> None:
    """Raise ConfigError if ``folder`` holds another sweep, or a study that cannot be read, or cannot be written to."""
    check_folder_for(folder)
    if is_driven(folder):
        raise ConfigError(f"the sweep in {folder} is being run by another process")
    check_spec(sweep, folder)
    check_study(sweep, folder)


def check_spec(sweep: Sweep, folder: Path) -> None:
    """Raise ConfigError if ``folder`` holds another sweep."""
    if (folder / SPEC_FILE).exists() and read_sweep(folder).study_name != sweep.study_name:
        raise ConfigError(
            f"{folder} holds a sweep with another base or space; choose another --storage, or remove the folder"
        )


def _run_trials(
    sweep: Sweep, folder: Path, place: SharedFolder, ledger: Ledger, at_a_time: int, say: Callable[[str], None]
) -> None:
    resources, trials = sweep.resources, f"{place.address}/{TRIALS}"
    shared = f"{place.address}/{SHARED}" if sweep.share else None
    housekeeping = Housekeeping(ledger, place)
    callbacks: list[tune.Callback] = [housekeeping]
    callbacks += [] if place.address == str(folder) else [StudyKeeper(folder, place)]
    if sweep.executor == "inline":
        folder = Path(place.address)  # Train's drivers stay on the head, inline trials do not
        trainable = inline_trial(resources, Path(trials), sweep.study_name)
        needs: Any = lambda settings: tune.PlacementGroupFactory(  # noqa: E731
            [{"CPU": resources.cpus_per_worker, "GPU": settings["gpus"]}]
        )
    else:
        backend = pick_backend(resources)
        trainable = train_driver(resources, backend, trials, sweep.study_name)
        # Drivers that ask for CPUs would starve their own workers: they only take a place on the head.
        needs = {DRIVER: 1} if DRIVER in ray.cluster_resources() else {"node:__internal_head__": 0.001}
    fit(sweep, folder, ledger, tune.with_resources(trainable, needs), at_a_time, say, callbacks, shared)
    housekeeping.tidy()


def fit(
    sweep: Sweep,
    folder: Path,
    ledger: Ledger,
    trainable: Any,
    at_a_time: int,
    say: Callable[[str], None],
    callbacks: Sequence[tune.Callback] = (),
    shared: str | None = None,
) -> None:
    """Let Tune run ``trainable`` for every trial that the ledger proposes, ``at_a_time`` of them side by side.

    ``shared`` is the address of what trials have in common.
    """
    console = Console()
    shown = progress_on(console, ledger, say)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=StudySearcher(ledger, shared),
            scheduler=StudyScheduler(ledger),
            num_samples=-1,  # the searcher says when there is no more: trials that fail may come again
            max_concurrent_trials=at_a_time,
            reuse_actors=sweep.executor == "inline",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            callbacks=[shown, *callbacks],
            stop=WhenOver(ledger),
            verbose=0,
        ),
    )
    with warnings.catch_warnings(), shown.shown(console):
        warnings.simplefilter("ignore")
        tuner.fit()


class WhenOver(tune.Stopper):
    """Ends the sweep, also what runs, when its budget is spent or its goal is reached."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(self.ledger.why_over())


class StudyKeeper(tune.Callback):
    """Keeps a copy of the study where the trials are: a head that is lost takes only its running trials along."""

    def __init__(self, folder: Path, place: SharedFolder) -> None:
        self.folder, self.place = folder, place

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        try:
            keep_database(self.folder / STUDY_FILE, self.place)
        except OSError as error:  # the next trial's end is the next try
            logger.warning("the study could not be kept in %s: %s", self.place.address, error)


def say_to_stdout(line: str) -> None:
    """Print at once, also into a pipe."""
    print(line, flush=True, file=sys.stdout)
