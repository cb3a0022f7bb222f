"""The questions that are asked before a sweep makes or starts anything; a wrong answer is one line."""

import sqlite3
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from inflora.config import ConfigError
from inflora.errors import one_line
from inflora.files import nearest
from inflora.patience import NoAnswerError, within
from inflora.setup import check, identity, search_stream
from inflora.storage import SharedFolder
from sweeps.engine.ledger.database import STUDY_FILE, URL_FILE, chosen_url, file_of
from sweeps.engine.ledger.lease import refuse_if_driven
from sweeps.engine.ledger.lock import is_driven
from sweeps.engine.ledger.study import check_study, is_over
from sweeps.engine.ledger.trials import place_of
from sweeps.engine.run.cluster import (
    Cluster,
    connect,
    require_gpus,
    trials_at_a_time,
    why_too_many_to_drive,
)
from sweeps.engine.run.reach import PATIENCE_S, reachable_ray, reachable_store, reachable_study
from sweeps.engine.show.inputs import DataInput, data_inputs
from sweeps.engine.show.mlflow_store import source_tags
from sweeps.engine.show.output import check_can_write
from sweeps.engine.space.samplers import why_blind
from sweeps.engine.space.spec import SPEC_FILE, Sweep, parse_sweep, read_sweep

TRIALS = "trials"
"""The folder of the trials' states in a sweep's shared place, one below it for each."""


class Ready(NamedTuple):
    """A sweep that can start: where study and trials are, what those store there, how many run at a time.

    ``tags`` and ``inputs`` are what MLflow is told of all its runs. ``images``: what every trial is judged on, the
    validation images of the tasks that it learns.
    """

    study: str
    place: SharedFolder
    stored_bytes: int
    at_a_time: int
    tags: dict[str, str]
    inputs: list[DataInput]
    images: int


def preflight(sweep: Sweep, folder: Path, tracking_uri: str, cluster: Cluster, say: Callable[[str], None]) -> Ready:
    """Check settings, storage and tracking, then connect to the cluster if there is a trial to run.

    Raises:
        ConfigError: The first thing that does not fit or does not answer; nothing has been made.
    """
    require_gpus(sweep.resources, cluster.address)
    for config in sweep.extreme_configs():
        check(config)
    study = chosen_url(folder, cluster.study)
    check_folder(sweep, folder, cluster)
    place, stored_bytes = trials_place(sweep, folder, cluster)
    check_tracking(tracking_uri, folder, say)
    # Reads the weights, which may have to be fetched: after all that is quick, before the cluster is asked.
    stream = search_stream(sweep.base)
    tags = identity(sweep.base, stream) | source_tags(sys.argv[0])
    inputs = data_inputs(stream, sweep.base, "validation")
    at_a_time = 0 if is_over(sweep, study, stored_bytes) else find_room(sweep, cluster, say)
    images = sum(len(task.eval_rows) for task in stream.tasks[: sweep.tasks_learnt])
    return Ready(study, place, stored_bytes, at_a_time, tags, inputs, images)


def check_tracking(uri: str, folder: Path, say: Callable[[str], None]) -> None:
    """Raise ConfigError unless the tracking store answers; a sweep that has begun goes on without it, and says so."""
    try:
        reachable_store(uri, folder)
    except ConfigError as error:
        if not (folder / SPEC_FILE).exists():
            raise
        say(f"{error}; trials go on, and what it misses is sent when it answers")


def find_room(sweep: Sweep, cluster: Cluster, say: Callable[[str], None]) -> int:
    """Connect to the cluster; how many trials it takes at a time.

    Raises:
        ConfigError: There is none, or it has no room for a single trial.
    """
    reachable_ray(cluster.address)
    connect(cluster.address, say)
    at_a_time = trials_at_a_time(sweep.resources, sweep.executor, say)
    return cluster.at_a_time or at_a_time


def doubts(sweep: Sweep, at_a_time: int) -> list[str]:
    """What speaks against running so many trials at a time, if anything."""
    found = [why_blind(sweep, at_a_time), why_too_many_to_drive(at_a_time) if sweep.executor == "train" else ""]
    return [doubt for doubt in found if doubt]


def trials_place(sweep: Sweep, folder: Path, cluster: Cluster) -> tuple[SharedFolder, int]:
    """Where the trials of a sweep in ``folder`` are kept, and the bytes that they store there.

    A sweep that has begun there waits for a place that is away.

    Raises:
        ConfigError: A place that does not answer, is another driver's, or has the copy of another sweep.
    """
    if not cluster.shared:
        place = SharedFolder(str(folder))
        return place, place.bytes_in(TRIALS)
    place, study = SharedFolder(f"{cluster.shared}/{sweep.name}"), chosen_url(folder, cluster.study)
    try:
        if has_begun_in(place, sweep, study):
            return place, place.when_there(lambda: _look_at_copy(sweep, study, place))
        return place, within(2 * PATIENCE_S, lambda: _look_at_copy(sweep, study, place))
    except NoAnswerError as error:
        raise ConfigError(f"--shared {place.address} {error}") from None
    except OSError as error:
        raise ConfigError(f"--shared {place.address} does not answer: {one_line(str(error), 300)}") from None


def has_begun_in(place: SharedFolder, sweep: Sweep, url: str) -> bool:
    """True if an earlier start of the sweep has kept its trials in that place.

    Raises:
        ConfigError: A study on a server, whose earlier starts have kept them in another: it may be driven from there.
    """
    study = check_study(sweep, url)
    kept = "" if study is None else place_of(study)
    if file_of(url) is None and kept not in ("", place.address):
        raise ConfigError(f"the trials of the study {sweep.study_name} in {url} are in {kept}, not in {place.address}")
    return kept == place.address


def _look_at_copy(sweep: Sweep, url: str, place: SharedFolder) -> int:
    """The bytes that trials store in a place; ConfigError if it is another driver's, or has another sweep or study."""
    content = place.read(SPEC_FILE)
    refuse_if_driven(place)
    if content:
        found = parse_sweep(content, f"{place.address}/{SPEC_FILE}")
        _require_same(sweep, found, place.address, "choose another --shared, or remove it")
        named = place.read(URL_FILE)
        kept, ours = (named.decode().strip() if named else "a file"), ("a file" if file_of(url) else url)
        if kept != ours:
            raise ConfigError(f"{place.address} is of a sweep whose study is {kept}, this one's is {ours}")
    return place.bytes_in(TRIALS)


def check_folder(sweep: Sweep, folder: Path, cluster: Cluster) -> None:
    """Raise ConfigError if ``folder`` holds another sweep or a damaged study, or nothing can take a study."""
    check_can_write(folder)
    study = chosen_url(folder, cluster.study)
    if file_of(study):
        check_databases_work(folder)
    elif not cluster.shared:
        raise ConfigError("--study needs --shared: whoever goes on elsewhere needs the trials' states too")
    else:
        reachable_study(study)
    if is_driven(folder):
        raise ConfigError(f"the sweep in {folder} is being run by another process")
    check_spec(sweep, folder)
    check_study(sweep, study)


def check_databases_work(folder: Path) -> None:
    """Raise ConfigError unless a database like the study's works in ``folder``: some network file systems break it."""
    try:
        with (
            tempfile.TemporaryDirectory(dir=nearest(folder)) as name,
            closing(sqlite3.connect(Path(name) / STUDY_FILE)) as database,
        ):
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("CREATE TABLE t (x INTEGER)")
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"storage {folder} does not work: {error}") from None


def check_spec(sweep: Sweep, folder: Path) -> None:
    """Raise ConfigError if ``folder`` holds another sweep."""
    if (folder / SPEC_FILE).exists():
        _require_same(sweep, read_sweep(folder), str(folder), "choose another --storage, or remove the folder")


def _require_same(sweep: Sweep, found: Sweep, where: str, advice: str) -> None:
    """Raise ConfigError if another sweep was found in a place."""
    if found.study_name != sweep.study_name:
        raise ConfigError(f"{where} holds a sweep with another base or space; {advice}")
