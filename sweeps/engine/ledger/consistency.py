"""The check that a study is one which a sweep's ledger could have written: what follows from others must follow."""

import math
from collections.abc import Mapping

import optuna
from optuna.trial import FixedTrial, FrozenTrial

from sweeps.engine.ledger.records import Outcome, TrialRecord
from sweeps.engine.ledger.trials import bill_so_far, hours_so_far, key_of, read_records, validation_images, waiting
from sweeps.engine.space import domains
from sweeps.engine.space.objectives import Metric, direction, measure
from sweeps.engine.space.spec import Sweep


def check_consistency(sweep: Sweep, study: optuna.Study) -> None:
    """Raise ValueError unless a study is one that the sweep's ledger could have written."""
    if [each.name.lower() for each in study.directions] != [direction(metric) for metric in sweep.objectives]:
        raise ValueError(f"it looks for another direction of {', '.join(sweep.objectives)}")
    if not (math.isfinite(hours_so_far(study)) and hours_so_far(study) >= 0):
        raise ValueError(f"its hours are {hours_so_far(study)}")
    key_of(study)
    validation_images(study)
    waiting(study)
    bill_so_far(study)
    trials = study.get_trials(deepcopy=False)
    by_number = {trial.number: trial for trial in trials}
    for record in read_records(study):
        _check_settings(sweep, by_number[record.number], record)
        if record.outcome is Outcome.FINISHED:
            _check_values(sweep, by_number[record.number], record)


def _check_settings(sweep: Sweep, trial: FrozenTrial, record: TrialRecord) -> None:
    """Require the recorded settings to be the proposed ones; a driver may have died between writing the two."""
    if not record.settings and record.outcome is Outcome.RUNNING and not record.reports:
        return
    proposed = FixedTrial(trial.params)
    settings = domains.suggest(sweep.space, proposed)
    if settings != record.settings or proposed.distributions != trial.distributions:
        raise ValueError(f"trial {record.number} has other settings than were proposed: {record.settings}")
    if not domains.contains(sweep.space, settings):
        raise ValueError(f"trial {record.number} lies outside the space: {settings}")


def _check_values(sweep: Sweep, trial: FrozenTrial, record: TrialRecord) -> None:
    """A finished trial's objectives, and by how much it breaks bounds, must be what its reports say."""
    reports = record.reports
    if not reports or len(reports) != reports[-1].tasks:
        raise ValueError(f"trial {record.number} has finished with {len(reports)} reports, not one after every task")
    known: Mapping[Metric, float | None] = {
        metric: measure(metric, reports, sweep.resources.gpus) for metric in sweep.judged_by
    }
    # The cost of a trial hangs on its resources, which another start may have changed.
    told = dict(zip(sweep.objectives, record.values, strict=True))
    if any(known[metric] != value for metric, value in told.items() if metric != "cost/gpu_hours"):
        raise ValueError(f"trial {record.number} has other values than it reported: {told}")
    bounds = {each.text: each for each in sweep.constraints}
    if trial.constraints.keys() != bounds.keys():
        raise ValueError(f"trial {record.number} was held to other bounds: {', '.join(trial.constraints)}")
    for text, bound in bounds.items():
        value = known[bound.metric]
        if bound.metric != "cost/gpu_hours" and (value is None or trial.constraints[text] != bound.excess(value)):
            raise ValueError(f"trial {record.number} breaks {text} by another amount than it reported")
