"""The ledger, shown in MLflow.

MLflow is a view: a process beside the driver compares the study with what it has sent and sends the difference, so
training never waits for a server, and what a server missed while it was down is still there to be sent. Every metric
carries the time at which the trial reported it, which makes sending twice the same as sending once.
"""

import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mlflow.entities import Run, RunTag
from tenacity import Retrying, before_sleep_log, stop_after_delay, wait_exponential

from inflora.config import RunConfig, config_hash, dump_config
from sweeps.engine.ledger.records import Outcome, TrialRecord, now_ms
from sweeps.engine.ledger.study import follow_study
from sweeps.engine.ledger.trials import Reader, validation_images
from sweeps.engine.show import report as sweep_report
from sweeps.engine.show.description import NOTE, description, plain, trial_note
from sweeps.engine.show.inputs import DataInput
from sweeps.engine.show.mlflow_estimates import EstimateSender, best_metrics
from sweeps.engine.show.mlflow_store import (
    experiment_id,
    how_to_export,
    log_accuracy,
    log_all,
    make_client,
    mlflow_metrics,
    params_of,
    params_of_sweep,
    tag_of,
    tagged_runs,
)
from sweeps.engine.show.tracking import BEHIND, DELIVERED, CloseMessage, StartMessage
from sweeps.engine.space.estimate import estimate, winner
from sweeps.engine.space.spec import Sweep

logger = logging.getLogger(__name__)

_OUTCOME_TAG = "inflora.outcome"
_STATUS = {Outcome.FINISHED: "FINISHED", Outcome.PRUNED: "KILLED", Outcome.FAILED: "FAILED"}


class Mirror:
    """Makes MLflow show what the study holds: a parent run for the sweep, a child for every trial."""

    def __init__(
        self, sweep: Sweep, folder: Path, uri: str, tags: Mapping[str, str], inputs: Sequence[DataInput] = ()
    ) -> None:
        self.sweep, self.tags = sweep, dict(tags)
        self._inputs = [each.entity() for each in inputs]
        self._export = how_to_export(folder, uri)
        self.client = make_client(uri)
        self.study = follow_study(sweep, folder)
        self._reader = Reader(self.study)
        self._images = validation_images(self.study)
        self._experiment = ""
        self.parent: str | None = None
        self._note = ""
        self._children: dict[int, Run] = {}
        self._sent: dict[int, tuple[int, Outcome, str]] = {}
        self._estimates = EstimateSender(self.client, self._children)

    def sync(self) -> None:
        """Send what has not been sent. Raises whatever MLflow raises; calling again is safe."""
        records, is_news = self._send()
        if is_news:
            self._describe(records)

    def finish(self, *, complete: bool, over: str = "") -> None:
        """Send the rest and the sweep's own results; the parent run ends as finished only if the sweep has.

        Trials that were interrupted are shown as killed until the sweep goes on with them.
        """
        records, _ = self._send()
        assert self.parent is not None
        for record in records:
            if record.outcome is Outcome.RUNNING and record.number in self._children:
                self.client.set_terminated(self._children[record.number].info.run_id, "KILLED")
        self.client.set_tag(self.parent, "inflora.ended_early", over)
        known = estimate(self.sweep, records, self._images)
        self._estimates.send(records, known)
        best = winner(records, known)
        if best is not None:
            metrics = best_metrics(best, known)
            tags = [RunTag(f"best/{path}", str(value)) for path, value in best.settings.items()]
            tags += [RunTag("inflora.best_trial", str(best.number))]
            self.client.log_batch(self.parent, metrics=metrics, tags=tags)
        self.client.log_text(self.parent, sweep_report.page(self.sweep, self.study), "report.html")
        interrupted = "Interrupted: the command that began it goes on with it."
        self._describe(records, f"Ended early: {plain(over)}." if over else "" if complete else interrupted)
        self.client.set_terminated(self.parent, "FINISHED" if complete else "KILLED")

    def _send(self) -> tuple[list[TrialRecord], bool]:
        """Bring the trials' runs up to date; all trials, and whether there was anything to send."""
        is_news = self.parent is None
        if self.parent is None:
            self.parent = self._find_or_create_parent()
        records = self._reader.records()
        for record in records:
            state = (len(record.reports), record.outcome, record.log)
            sent = self._sent.get(record.number)
            if sent != state and record.settings:
                self._sync_trial(record, None if sent is None else sent[0])
                self._sent[record.number] = state
                is_news = True
        return records, is_news

    def _describe(self, records: Sequence[TrialRecord], ending: str = "") -> None:
        assert self.parent is not None
        note = description(self.sweep, records, estimate(self.sweep, records, self._images), self._export, ending)
        if note != self._note:
            self.client.set_tag(self.parent, NOTE, note)
            self._note = note

    def _find_or_create_parent(self) -> str:
        self._experiment = experiment_id(self.client, self.sweep.base.data.dataset, self.sweep.objective)
        parents = []
        for run in tagged_runs(self.client, self._experiment, *tag_of(self.study)):
            number = run.data.tags.get("inflora.trial")
            if number is None:
                parents.append(run)
            else:
                self._children[int(number)] = run
        if parents:
            parent = parents[0]
            self.client.update_run(parent.info.run_id, status="RUNNING")
        else:
            tags = {**self.tags, **self._own_tags()}
            parent = self.client.create_run(self._experiment, start_time=now_ms(), run_name=self.sweep.name, tags=tags)
        self._note = parent.data.tags.get(NOTE, "")
        self._log_inputs(parent)
        if not parent.data.params:
            self.client.log_text(parent.info.run_id, self.sweep.model_dump_json(indent=2), "sweep.json")
            log_all(self.client, parent.info.run_id, params=params_of_sweep(self.sweep))  # last: they say all is there
        return parent.info.run_id

    def _own_tags(self) -> dict[str, str]:
        return {
            "inflora.sweep": self.sweep.study_name,
            **dict([tag_of(self.study)]),
            "inflora.objective": ", ".join(self.sweep.objectives),
            "inflora.protocol": self.sweep.protocol,
        }

    def _log_inputs(self, run: Run) -> None:
        """Log the datasets, unless an earlier start of this sweep has."""
        if self._inputs and not (run.inputs and run.inputs.dataset_inputs):
            self.client.log_inputs(run.info.run_id, datasets=self._inputs)

    def _sync_trial(self, record: TrialRecord, reports_sent: int | None) -> None:
        """Send what is new of a trial in one batch; sent again by another start it changes nothing.

        ``reports_sent`` is None the first time; what a lost answer has left out of its run is then completed.
        """
        config = self._config_of(record)
        run = self._children.get(record.number)
        if run is not None and _OUTCOME_TAG in run.data.tags and run.info.status in _STATUS.values():
            return  # sent to its end by an earlier start of this sweep
        if run is None:
            run = self._children[record.number] = self._create_child(record, config)
        elif run.info.status != "RUNNING":
            self.client.update_run(run.info.run_id, status="RUNNING")  # it was interrupted
        if reports_sent is None:
            self._log_inputs(run)
        metrics = [
            metric
            for report in record.reports[reports_sent or 0 :]
            for metric in mlflow_metrics(
                report.tasks_done, {**report.metrics, "seconds": report.seconds}, report.accuracies, report.time_ms
            )
        ]
        tags = {}
        if record.outcome in _STATUS:
            tags = {_OUTCOME_TAG: record.outcome.value, NOTE: trial_note(self.sweep, record)}
        tags |= {"inflora.log": record.log} if record.log else {}
        tags |= {"inflora.reason": record.reason} if record.reason else {}
        tags |= {"inflora.failures": json.dumps([each.reason for each in record.tries])} if record.tries else {}
        params = params_of(config) if config and reports_sent is None and not run.data.params else []
        log_all(self.client, run.info.run_id, metrics, params, [RunTag(name, value) for name, value in tags.items()])
        if record.outcome in _STATUS:
            self._end_child(run.info.run_id, record, config)

    def _config_of(self, record: TrialRecord) -> RunConfig | None:
        config = self.sweep.config_or_none(record.settings)
        return config and self.sweep.resources.on_device(config)

    def _create_child(self, record: TrialRecord, config: RunConfig | None) -> Run:
        assert self.parent is not None
        own = {
            "inflora.trial": str(record.number),
            "mlflow.parentRunId": self.parent,
            NOTE: trial_note(self.sweep, record),
        }
        hashed = {"config_hash": config_hash(config)} if config else {}
        tags = {**self.tags, **hashed, **self._own_tags(), **own}
        name = f"{self.sweep.name}-{record.number:04d}"
        return self.client.create_run(self._experiment, start_time=record.start_ms, run_name=name, tags=tags)

    def _end_child(self, run_id: str, record: TrialRecord, config: RunConfig | None) -> None:
        if record.reports:
            matrix = [report.accuracies for report in record.reports]
            log_accuracy(self.client, run_id, matrix, [report.metrics["acc/seen"] for report in record.reports])
        if config:
            self.client.log_text(run_id, dump_config(config), "config.yaml")
        self.client.set_terminated(run_id, _STATUS[record.outcome], record.end_ms)


class _DriverListener(threading.Thread):
    """Listens to the driver; without one there is nothing to mirror, and the next one's mirror must be alone."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.said_last = threading.Event()
        self.closing = CloseMessage(complete=False, over="", patience_s=0.0)

    def run(self) -> None:
        try:
            for line in sys.stdin:
                self.closing = CloseMessage.model_validate_json(line)
                self.said_last.set()
        finally:
            os._exit(1)


def follow(start: StartMessage, driver: _DriverListener) -> bool:
    """Send differences until the driver says its last, then all that is left; whether MLflow took it.

    A failure is only a later try.
    """
    current: Mirror | None = None

    def with_mirror(do: Callable[[Mirror], None]) -> None:
        """A failed request may have arrived all the same: the next try looks at what is there with new eyes."""
        nonlocal current
        mirror, current = current or Mirror(start.sweep, start.folder, start.uri, start.tags, start.inputs), None
        do(mirror)
        current = mirror

    wait_s = start.every_s
    while not driver.said_last.wait(wait_s):
        try:
            with_mirror(Mirror.sync)
            wait_s = start.every_s
        except Exception as error:  # a server may fail in any way; the study still holds what it missed
            wait_s = min(2 * wait_s, 30.0)
            logger.warning("MLflow is behind (%s); trials go on, the next try is in %.0f s", error, wait_s)
    closing = driver.closing
    retry = Retrying(
        stop=stop_after_delay(closing.patience_s),
        wait=wait_exponential(max=5),
        before_sleep=before_sleep_log(logger, logging.WARNING),
        reraise=True,
    )
    try:
        retry(with_mirror, lambda mirror: mirror.finish(complete=closing.complete, over=closing.over))
    except Exception as error:
        logger.warning("MLflow has not taken everything: %s", error)
        return False
    return True


def main() -> None:
    """A mirror's own process: told what to do on its input, it warns on its output and ends with how it went."""
    for name in ("mlflow", "alembic", "optuna"):
        logging.getLogger(name).setLevel(logging.WARNING)
    start = StartMessage.model_validate_json(sys.stdin.readline())
    driver = _DriverListener()
    driver.start()
    code = DELIVERED if follow(start, driver) else BEHIND
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the thread that listens would wait for the driver's end


if __name__ == "__main__":
    main()
