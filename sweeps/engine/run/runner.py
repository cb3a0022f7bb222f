"""Start a sweep, or go on with one: what is asked first, the lock, the ledger, the trials, the last delivery."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import ray

from inflora.config import ConfigError
from inflora.files import remove_torn, write_atomically
from inflora.storage import PATIENCE_S
from sweeps.engine.ledger.database import file_of, keep_url
from sweeps.engine.ledger.lease import leased
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.lock import held
from sweeps.engine.ledger.records import TrialRecord
from sweeps.engine.ledger.snapshot import fetch_database
from sweeps.engine.run.cluster import THIS_MACHINE, Cluster
from sweeps.engine.run.nodes import check_nodes, likeness
from sweeps.engine.run.placement import placed_trainable
from sweeps.engine.run.preflight import TRIALS, Ready, check_spec, doubts, has_begun_in, preflight
from sweeps.engine.run.storage import (
    Housekeeping,
    begun_anew,
    copy_study,
    copy_study_at_last,
    mlflow_kept,
    take_newer,
)
from sweeps.engine.run.tune import run_trials
from sweeps.engine.run.watch import NodeWatch
from sweeps.engine.show.tracking import Tracker
from sweeps.engine.space.spec import SPEC_FILE, Sweep

WarmStart: TypeAlias = tuple[Sequence[Mapping[str, Any]], str]
"""Settings to try first, and the study they come from."""


class SweepResult(NamedTuple):
    """All trials of a sweep when it stops; ``complete``: none is left to run; ``delivered``: MLflow has everything.

    ``over`` says why it ended before all trials that were asked for; empty if all were done, or if it was interrupted.
    ``images`` is the number of images that its trials were judged on.
    """

    records: list[TrialRecord]
    complete: bool
    delivered: bool
    over: str
    images: int


def run_sweep(
    sweep: Sweep,
    folder: Path,
    tracking_uri: str,
    *,
    cluster: Cluster = THIS_MACHINE,
    say: Callable[[str], None],
    warm_start: WarmStart | None = None,
) -> SweepResult:
    """Run what is left of a sweep's trials.

    Raises:
        ConfigError: Before anything is made or started: settings, data, backbone, folder, addresses or resources that
            do not fit. After the first trials: all have failed for one reason.
    """
    folder = folder.absolute()
    try:
        ready = preflight(sweep, folder, tracking_uri, cluster, say)
        # The lock is seen on this machine alone: a place of others needs a lease.
        is_own, patience_s = ready.place.address == str(folder), 0.0
        if has_begun_in(ready.place, sweep, ready.study):
            patience_s = PATIENCE_S
        lease = nullcontext() if is_own else leased(ready.place, say, patience_s=patience_s)
        with locked(sweep, folder), lease, mlflow_kept(tracking_uri, folder, ready.place, say):
            ledger = _open_ledger(sweep, folder, ready, warm_start, say)
            result = _run_what_is_left(ledger, folder, ready, tracking_uri, say)
    finally:
        ray.shutdown()
    if hopeless := ledger.why_hopeless():
        raise ConfigError(hopeless)
    return result


def _open_ledger(
    sweep: Sweep, folder: Path, ready: Ready, warm_start: WarmStart | None, say: Callable[[str], None]
) -> Ledger:
    """The ledger in ``folder``, from its backup where the folder was lost with its machine, or is behind it."""
    keep_url(folder, ready.study)
    file = file_of(ready.study)

    def take() -> bool:
        fetched = file is not None and fetch_database(file, ready.place)
        return fetched or take_newer(sweep, folder, ready.place)

    if ready.place.when_there(take):
        say(f"sweep {sweep.name}: the study is the one kept in {ready.place.address}")
    ledger = Ledger(sweep, folder, ready.stored_bytes)
    ledger.note_images(ready.images)
    ledger.note_place(ready.place.address)
    ready.place.when_there(lambda: copy_study(folder, ready.place))  # `sweeps status` reads it there
    if warm_start is not None:
        found = ledger.warm_start(*warm_start)
        say(f"warm start: {found} settings of {warm_start[1]} lie in this space and are tried first")
    return ledger


def _run_what_is_left(
    ledger: Ledger, folder: Path, ready: Ready, tracking_uri: str, say: Callable[[str], None]
) -> SweepResult:
    remaining = 0 if ledger.why_over() else ledger.remaining()
    done = ledger.sweep.trials - ledger.remaining()
    say(f"sweep {ledger.sweep.name}: {remaining} trials to run" + (f", {done} done before" if done > 0 else ""))
    if remaining and ledger.sweep.sampler == "gp" and ledger.sweep.gp_falls_back:
        say("sampler gp proposes as tpe does: some settings hang on others, or there are constraints or tradeoffs")
    if remaining:
        for doubt in doubts(ledger.sweep, min(ready.at_a_time, remaining)):
            say(doubt)
        ready.place.when_there(lambda: check_nodes(ready.place))
    tracker = Tracker(ledger.sweep, folder, tracking_uri, ready.tags, ready.inputs)
    tracker.start()
    try:
        if remaining:
            _start_trials(ledger, folder, ready, min(ready.at_a_time, remaining), say)
    finally:
        over = ledger.why_over()
        complete = ledger.remaining() == 0 or bool(over)
        # Before the last delivery, which may take minutes: the machines are needed no more.
        ray.shutdown()
        is_ours = True
        try:
            is_ours = copy_study_at_last(folder, ready.place, say)
        finally:
            # A driver that has taken over shows these runs now: what this one knows would end them.
            delivered = is_ours and tracker.close(complete=complete, over=over)
    return SweepResult(ledger.records(), complete, delivered, over, ready.images)


def _start_trials(ledger: Ledger, folder: Path, ready: Ready, at_a_time: int, say: Callable[[str], None]) -> None:
    """Run trials as the sweep's executor does: in workers of Ray Train, or inside the Tune trial itself."""
    place = ready.place
    for number in place.when_there(lambda: begun_anew(ledger.sweep, ledger.records(), place)):
        say(f"trial {number} begins anew: an earlier version kept its state without a word on its settings")
    place.when_there(lambda: place.make(TRIALS))
    nodes = NodeWatch(ledger, place, likeness(ledger.sweep.base.data), say)
    housekeeping = Housekeeping(ledger, folder, place)
    trainable = placed_trainable(ledger.sweep, f"{place.address}/{TRIALS}")
    run_trials(ledger, folder, trainable, at_a_time, say, nodes, [housekeeping])
    housekeeping.tidy()  # a worker that was being stopped may have written once more


@contextmanager
def locked(sweep: Sweep, folder: Path) -> Iterator[None]:
    """Hold a sweep's folder, with its settings in it.

    Raises:
        ConfigError: Another driver is at work there, or another sweep was run there.
    """
    with held(folder):
        check_spec(sweep, folder)  # again: before the lock was held another sweep may have begun here
        write_atomically(folder / SPEC_FILE, sweep.model_dump_json(indent=2).encode())
        remove_torn(folder, "*")  # nobody else writes here, now
        yield


def say_to_stdout(line: str) -> None:
    """Print at once, also into a pipe."""
    print(line, flush=True, file=sys.stdout)
