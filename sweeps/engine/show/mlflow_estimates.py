"""The estimates of a sweep's scores, shown in MLflow: three metrics of every finished trial's run, a tag on one.

Every trial that finishes moves the estimates of all: they are sent when a sweep ends, so that what MLflow then shows
does not hang on when it was told. While it runs the description of its parent has them. Sent is what has moved far
enough to be seen.
"""

from collections.abc import Mapping, Sequence

from mlflow import MlflowClient
from mlflow.entities import Metric, Run

from sweeps.engine.ledger.records import TrialRecord
from sweeps.engine.space.estimate import Estimate, Estimates, winner

CHOSEN_TAG = "inflora.chosen"
_NAMES = {bound: f"estimate/{bound}" for bound in Estimate._fields}
_SEEN = 0.00005
"""Half of the last digit that tables show."""


class EstimateSender:
    """Sends estimates to the runs of finished trials; ``runs`` are those that the mirror has made or found."""

    def __init__(self, client: MlflowClient, runs: Mapping[int, Run]) -> None:
        self.client, self.runs = client, runs
        self._told: dict[int, Estimate] = {}
        self._chosen: set[int] | None = None

    def send(self, records: Sequence[TrialRecord], known: Estimates | None, least: float = _SEEN) -> None:
        """Send the estimates that have moved by ``least``, and mark the run of the setting to train."""
        if known is not None:
            # One moment for all, which the trials themselves tell: what is sent twice is there once.
            time_ms = max(record.reports[-1].time_ms for record in known.finished)
            for number, now in known.of_trials().items():
                if number in self.runs and self._has_moved(number, now, least):
                    step = len(known.finished)
                    metrics = [Metric(_NAMES[bound], value, time_ms, step) for bound, value in now._asdict().items()]
                    self.client.log_batch(self.runs[number].info.run_id, metrics=metrics)
                    self._told[number] = now
        self._mark(winner(records, known))

    def _has_moved(self, number: int, now: Estimate, least: float) -> bool:
        there = self.runs[number].data.metrics
        known = (there.get(name) for name in _NAMES.values())
        before = self._told.get(number) or tuple(value for value in known if value is not None)
        return len(before) < len(now) or any(abs(a - b) >= least for a, b in zip(before, now, strict=True))

    def _mark(self, best: TrialRecord | None) -> None:
        if self._chosen is None:
            self._chosen = {number for number, run in self.runs.items() if CHOSEN_TAG in run.data.tags}
        wanted = {best.number} & self.runs.keys() if best is not None else set()
        for number in self._chosen - wanted:
            self.client.delete_tag(self.runs[number].info.run_id, CHOSEN_TAG)
            self._chosen = self._chosen - {number}
        for number in wanted - self._chosen:
            self.client.set_tag(self.runs[number].info.run_id, CHOSEN_TAG, "true")
            self._chosen = self._chosen | {number}


def best_metrics(best: TrialRecord, known: Estimates | None) -> list[Metric]:
    """The metrics of the setting to train, for the sweep's own run."""
    last = best.reports[-1]
    values = {f"best/{name}": value for name, value in last.metrics.items()}
    if best.value is not None:
        values["best/observed"] = best.value
    if known is not None:
        told = known.of_trials()[best.number]
        values |= {"best/estimate": told.mean, "best/estimate_low": told.low, "best/estimate_high": told.high}
    return [Metric(name, value, last.time_ms, len(known.finished) if known else 0) for name, value in values.items()]
