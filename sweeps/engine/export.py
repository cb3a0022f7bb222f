"""The best trial of a sweep, as a config that final training runs as it is."""

import json
from importlib.metadata import version
from pathlib import Path

import optuna
from pydantic import ValidationError

from inflora.config import ConfigError, RunConfig, config_hash, override
from sweeps.engine.ledger import read_records, study_url
from sweeps.engine.records import TrialRecord, best_record
from sweeps.engine.spec import SPEC_FILE, Sweep
from sweeps.engine.tracking import Mirror


def read_sweep(folder: Path) -> Sweep:
    """The sweep that was run in ``folder``.

    Raises:
        ConfigError: No sweep is there, or one of another version.
    """
    path = folder / SPEC_FILE
    try:
        return Sweep.model_validate_json(path.read_text())
    except OSError:
        beside = sorted(p.parent.name for p in folder.parent.glob(f"*/{SPEC_FILE}"))
        known = f"; sweeps in {folder.parent}: {', '.join(beside)}" if beside else ""
        raise ConfigError(f"no sweep in {folder}: {SPEC_FILE} is missing{known}") from None
    except ValidationError as error:
        raise ConfigError(f"{path} is of another version or damaged: {error.errors()[0]['msg']}") from None


def sweep_records(sweep: Sweep, folder: Path) -> list[TrialRecord]:
    """What the sweep's study holds."""
    return read_records(optuna.load_study(study_name=sweep.study_name, storage=study_url(folder)))


def export_best(sweep: Sweep, folder: Path, mirror: Mirror | None = None) -> RunConfig:
    """The best finished trial's config for final training (on train and validation images), with its provenance.

    Raises:
        ConfigError: No trial has finished.
    """
    records = sweep_records(sweep, folder)
    best = best_record(records)
    if best is None:
        raise ConfigError(f"no trial of {sweep.name} has finished yet: {len(records)} started, none to export")
    run_id = mirror.run_of(best.number) if mirror else None
    provenance = {
        "sweep": sweep.name,
        "study": sweep.study_name,
        "trial": best.number,
        "mlflow_run_id": run_id,
        "trial_config_hash": config_hash(sweep.config(best.settings)),
        "validation": best.reports[-1].metrics,
        "trials": len(records),
        "versions": {name: version(name) for name in ("inflora-sweeps", "torch", "timm", "ray", "optuna", "mlflow")},
    }
    config = override(sweep.config(best.settings), {"data.train_on": "train+validation"})
    return config.model_copy(update={"provenance": json.loads(json.dumps(provenance))})
