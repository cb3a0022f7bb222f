"""Ray Tune's searcher and scheduler, both speaking for the ledger."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from sweeps.engine.failures import Failure, headline, kind_of
from sweeps.engine.ledger import Ledger
from sweeps.engine.nodes import code_version
from sweeps.engine.records import TaskReport
from sweeps.engine.spec import Resources


class StudySearcher(Searcher):
    """Tune's way to the ledger: asks for trials, says when they have ended."""

    def __init__(self, ledger: Ledger, shared: str | None) -> None:
        super().__init__(metric=ledger.sweep.rung_metric, mode="max")
        self.ledger, self.shared = ledger, shared
        self.numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        """The next trial's number and settings; None when there is none now, Tune's FINISHED when none will come."""
        proposal = self.ledger.propose()
        if proposal is None:
            return Searcher.FINISHED if self.ledger.is_idle() or self.ledger.why_over() else None
        self.numbers[trial_id] = proposal.number
        return {
            "number": proposal.number,
            "tasks_done": proposal.tasks_done,
            "code": code_version(),
            "shared": self.shared,
            "tasks": self.ledger.sweep.tasks_learnt,
            "gpus": with_room(self.ledger.sweep.resources, proposal.failed),
            "config": self.ledger.sweep.config(proposal.settings).model_dump(mode="json"),
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
    """What Tune has just written down of a trial's failure, on the driver's disk: the storage has it only later."""
    text = Path(trial.error_file).read_text() if trial.error_file else ""
    return text.rpartition("Failure # ")[2].partition("\n")[2]


def with_room(resources: Resources, failed: Sequence[str]) -> float:
    """GPUs per worker: all of one where a share of it was too little memory."""
    was_full = any(kind_of(reason) is Failure.MEMORY for reason in failed)
    return max(1.0, resources.gpus_per_worker) if was_full and resources.gpus_per_worker else resources.gpus_per_worker
