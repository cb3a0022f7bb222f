"""The best trial of a sweep, as a config that final training runs as it is."""

import json
from importlib.metadata import version
from pathlib import Path

from inflora.config import ConfigError, RunConfig, config_hash, override
from sweeps.engine.ledger.records import TrialRecord, best_record
from sweeps.engine.ledger.study import load_study
from sweeps.engine.ledger.trials import read_records
from sweeps.engine.space.spec import Sweep


def sweep_records(sweep: Sweep, folder: Path) -> list[TrialRecord]:
    """All trials of the sweep's study."""
    return read_records(load_study(sweep, folder))


def find_best(sweep: Sweep, records: list[TrialRecord]) -> TrialRecord:
    """The best finished trial.

    Raises:
        ConfigError: No trial has finished.
    """
    best = best_record(records)
    if best is None:
        raise ConfigError(f"no trial of {sweep.name} has finished yet: {len(records)} started, none to export")
    return best


def export_config(sweep: Sweep, best: TrialRecord, trials: int, run_id: str | None) -> RunConfig:
    """A trial's config for final training (on train and validation images), with where it comes from."""
    provenance = {
        "sweep": sweep.name,
        "study": sweep.study_name,
        "trial": best.number,
        "protocol": sweep.protocol,
        "mlflow_run_id": run_id,
        "trial_config_hash": config_hash(sweep.config(best.settings)),
        "validation": best.reports[-1].metrics,
        "trials": trials,
        "versions": {name: version(name) for name in ("inflora-sweeps", "torch", "timm", "ray", "optuna", "mlflow")},
    }
    config = override(sweep.config(best.settings), {"data.train_on": "train+validation"})
    return config.model_copy(update={"provenance": json.loads(json.dumps(provenance))})
