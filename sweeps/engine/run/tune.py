"""The ledger behind Ray Tune's interfaces: it proposes (searcher), stops a trial (scheduler), ends all (stopper)."""

import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from rich.console import Console

from inflora.errors import one_line
from sweeps.engine.ledger.failures import Failure, headline, kind_of, pause_before
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.records import TaskReport, trial_name
from sweeps.engine.run.actors import forgiving
from sweeps.engine.run.watch import CostWatch, NodeWatch, WaitWatch, Watchdog
from sweeps.engine.show.progress import progress_on
from sweeps.engine.space.spec import Resources

STOPS_IN_VAIN = 4
"""So often Tune may stop with an error, without a task reported in between, before the sweep does."""


class StudySearcher(Searcher):
    """Tune's way to the ledger: asks for trials, says when they have ended."""

    def __init__(self, ledger: Ledger, nodes: NodeWatch) -> None:
        super().__init__(metric=ledger.sweep.rung_metric, mode="max")
        self.ledger, self.nodes = ledger, nodes
        self.numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        """The next trial's number and settings; None when there is none now, Tune's FINISHED when none will come."""
        proposal = self.ledger.propose()
        if proposal is None:
            # None makes Tune ask again: a trial that runs may fail and be proposed once more.
            return Searcher.FINISHED if self.ledger.is_idle() or self.ledger.why_over() else None
        self.numbers[trial_id] = proposal.number
        config, record = self.ledger.sweep.config(proposal.settings), self.ledger.record_of(proposal.number)
        return {
            "number": proposal.number,
            "name": trial_name(self.ledger.sweep.study_name, proposal.number, config),
            "tasks_done": proposal.tasks_done,
            "likeness": self.nodes.likeness._asdict(),  # a node that joins later is held to it
            "avoid": sorted(self.nodes.to_avoid(record)),
            "pause_s": pause_before(record.tries, proposal.tasks_done),
            "tasks": self.ledger.sweep.tasks_learnt,
            "gpus": gpus_for_retry(self.ledger.sweep.resources, proposal.failed),
            "config": self.ledger.sweep.resources.on_device(config).model_dump(mode="json"),
        }

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Close the trial's record; a stopped or failed one is closed already."""
        if error:
            self.ledger.fail(self.numbers[trial_id], "the trial ended with an error")
        else:
            self.ledger.close(self.numbers[trial_id])

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study is the state."""


class StudyScheduler(FIFOScheduler):
    """ASHA at equal numbers of tasks done, on what the ledger has of all trials, also those of earlier starts."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        """Write the report down and stop the trial if it is behind."""
        number = trial.config["number"]
        if "log" in result:
            self.ledger.note_log(number, result["log"])
        if "failure" in result:
            self.ledger.fail(number, result["failure"])
            return TrialScheduler.STOP
        if "report" not in result:
            return TrialScheduler.CONTINUE
        stop = self.ledger.report(number, TaskReport.model_validate_json(result["report"]))
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Keep why the trial failed."""
        self.ledger.fail(trial.config["number"], headline(last_error(trial)))


def last_error(trial: Any) -> str:
    """The failure that Tune has just written down, on the driver's disk: the storage has it only later."""
    text = Path(trial.error_file).read_text() if trial.error_file else ""
    return text.rpartition("Failure # ")[2].partition("\n")[2]


def gpus_for_retry(resources: Resources, failed: Sequence[str]) -> float:
    """GPUs per worker: all of one where a share of it was too little memory."""
    was_full = any(kind_of(reason) is Failure.GPU_MEMORY for reason in failed)
    return max(1.0, resources.gpus_per_worker) if was_full and resources.gpus_per_worker else resources.gpus_per_worker


def run_trials(
    ledger: Ledger,
    folder: Path,
    trainable: Any,
    at_a_time: int,
    say: Callable[[str], None],
    nodes: NodeWatch,
    callbacks: Sequence[tune.Callback] = (),
) -> None:
    """Let Tune run ``trainable`` for every trial that the ledger proposes, ``at_a_time`` of them side by side.

    Where Tune itself stops with an error, trials go on from their last finished tasks under another; not without end.
    """
    console = Console()

    def fit() -> None:
        progress = progress_on(console, ledger, say)
        watches = CostWatch(ledger, say), Watchdog(ledger, say)
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=StudySearcher(ledger, nodes),
                scheduler=StudyScheduler(ledger),
                num_samples=-1,  # the searcher says when there is no more: trials that fail may come again
                max_concurrent_trials=at_a_time,
                # An actor that has imported torch is worth keeping; those that drive Ray Train import little.
                reuse_actors=ledger.sweep.executor == "inline",
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(folder),
                callbacks=[progress, nodes, *watches, WaitWatch(ledger, progress.say), *callbacks],
                stop=StopWhenOver(ledger),
                verbose=0,
            ),
        )
        with warnings.catch_warnings(), forgiving(), _ctrl_c_kept(), progress.shown(console):
            warnings.simplefilter("ignore")  # Tune's and Train's, about arguments that only they can change
            tuner.fit()

    _go_on_after_stops(fit, ledger, say)


@contextmanager
def _ctrl_c_kept() -> Iterator[None]:
    """Give Ctrl-C back as it was: Tune takes it, and with what Tune leaves it would be heard by nobody."""
    is_main, before = threading.current_thread() is threading.main_thread(), signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)


def _go_on_after_stops(fit: Callable[[], None], ledger: Ledger, say: Callable[[str], None]) -> None:
    """Let ``fit`` run until it ends by itself; one error too many without a task done is raised."""
    stopped, done = 0, ledger.take_back()
    while True:
        try:
            return fit()
        except Exception as error:
            known = ledger.take_back()
            stopped, done = (1 if known > done else stopped + 1), known
            if stopped > STOPS_IN_VAIN:
                raise
            wait_s = 5 * 2**stopped
            say(f"Tune has stopped ({one_line(str(error), 300)}); its trials go on in {wait_s} seconds")
            time.sleep(wait_s)


class StopWhenOver(tune.Stopper):
    """Ends the sweep, also the trials that run, when its budget is spent or its goal is reached."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False  # single trials are stopped by the scheduler

    def stop_all(self) -> bool:
        return bool(self.ledger.why_over())
