"""The metrics that a sweep can optimise or bound, and which way each is better."""

from collections.abc import Sequence
from typing import Literal

from sweeps.engine.ledger.records import TaskReport

Objective = Literal["acc/final", "acc/avg_incremental", "bwt", "acc/current"]
"""The metrics that can name the best trial: more is better."""

Metric = Literal[
    "acc/final", "acc/avg_incremental", "bwt", "acc/current", "forgetting", "params/trainable", "cost/gpu_hours"
]

LESS_IS_BETTER = frozenset({"forgetting", "params/trainable", "cost/gpu_hours"})


def direction(metric: Metric) -> Literal["minimize", "maximize"]:
    """Optuna's word for which way ``metric`` is better."""
    return "minimize" if metric in LESS_IS_BETTER else "maximize"


def measure(metric: Metric, reports: Sequence[TaskReport], gpus: float) -> float | None:
    """A finished trial's ``metric``, None where its reports do not tell; ``gpus`` are the trial's.

    ``acc/current``: mean over tasks of a[i][i], each task's accuracy right after it was learnt;
    ``cost/gpu_hours``: time of all tasks times the trial's GPUs. The others are what the last report says.
    """
    if metric == "acc/current":
        return sum(report.accuracies[-1] for report in reports) / len(reports)
    if metric == "cost/gpu_hours":
        return gpu_hours(reports, gpus)
    return reports[-1].metrics.get(metric)


def gpu_hours(reports: Sequence[TaskReport], gpus: float) -> float:
    """The cost of a trial's tasks."""
    return sum(report.seconds for report in reports) * gpus / 3600
