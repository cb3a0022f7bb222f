"""The best trial of a sweep, as a config that final training runs as it is."""

import json
from importlib.metadata import version
from typing import Any

import optuna

from inflora.config import ConfigError, RunConfig, config_hash, override
from sweeps.engine.ledger.reading import read_kept
from sweeps.engine.ledger.records import BestBy, Outcome, TrialRecord
from sweeps.engine.ledger.trials import read_records, validation_images
from sweeps.engine.space.estimate import Estimates, estimate, winner, winners
from sweeps.engine.space.spec import Sweep


def read_trials(sweep: Sweep, study: optuna.Study) -> tuple[list[TrialRecord], Estimates | None]:
    """All trials of the sweep's study, and what they say of the scores."""
    records = read_records(study)
    return records, estimate(sweep, records, validation_images(study))


def find_best(
    sweep: Sweep, records: list[TrialRecord], known: Estimates | None, best_by: BestBy = BestBy.ESTIMATE
) -> TrialRecord:
    """The finished trial whose setting is the one to train.

    Raises:
        ConfigError: No trial has finished.
    """
    best = winner(records, known, best_by)
    if best is None:
        raise ConfigError(f"no trial of {sweep.name} has finished yet: {len(records)} started, none to export")
    return best


def export_config(
    sweep: Sweep,
    best: TrialRecord,
    records: list[TrialRecord],
    known: Estimates | None,
    run_id: str | None,
    best_by: BestBy = BestBy.ESTIMATE,
) -> RunConfig:
    """A trial's config for final training (on train and validation images), with where it comes from and why it."""
    provenance = {
        "sweep": sweep.name,
        "study": sweep.study_name,
        "trial": best.number,
        "protocol": sweep.protocol,
        "mlflow_run_id": run_id,
        "trial_config_hash": config_hash(sweep.config(best.settings)),
        "searched": sorted(best.settings),
        "validation": best.reports[-1].metrics,
        "objective": sweep.objective,
        "best_by": (best_by if known else BestBy.OBSERVED).value,
        "observed": best.value,
        "estimate": known.of_trials()[best.number]._asdict() if known else None,
        "trials": len(records),
        "finished": sum(record.outcome is Outcome.FINISHED for record in records),
        "versions": {name: version(name) for name in ("inflora-sweeps", "torch", "timm", "ray", "optuna", "mlflow")},
    }
    config = override(sweep.config(best.settings), {"data.train_on": "train+validation"})
    return config.model_copy(update={"provenance": json.loads(json.dumps(provenance))})


def best_settings(address: str, count: int = 3) -> tuple[list[dict[str, Any]], str]:
    """The settings of a sweep's best trials, and the study they come from.

    Raises:
        ConfigError: No sweep is there, or no trial of it has finished.
    """
    other, study, _ = read_kept(address)
    records, known = read_trials(other, study)
    best = winners(records, known)[:count]
    if not best:
        raise ConfigError(f"--warm-start: no trial of {other.name} has finished yet")
    return [record.settings for record in best], other.study_name
