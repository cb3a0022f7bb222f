"""MLflow as a sweep needs it: a client, an experiment, runs found by tags, batches."""

import json
import os
import shlex
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
from alembic.util import CommandError
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from inflora.config import ConfigError, RunConfig
from inflora.errors import one_line, without_password
from sweeps.engine.ledger.snapshot import snapshot
from sweeps.engine.ledger.trials import key_of
from sweeps.engine.run.reach import reachable_store, sqlite_file, store_scheme
from sweeps.engine.show import plots
from sweeps.engine.show.description import NOTE
from sweeps.engine.show.mlflow_database import make_whole
from sweeps.engine.space.spec import Sweep

_OWN_FILE = "mlflow.db"
_PARAM_LENGTH = 6000
_UNDECIDED = ("", "no_inferred_type", "custom_model_development_inferred", "genai_development_inferred")
"""What stands in an experiment's tags as long as nobody has chosen."""

_ABOUT = {
    "mlflow.experimentKind": "custom_model_development",
    NOTE: "Each sweep is a run with its trials below it; its description says what to train. "
    "Final runs alone open the test images.",
}
"""An experiment's tags for MLflow's pages: that models are trained in it, and a line below its title."""

_BATCH = 800
"""Metrics per request: with parameters and tags it stays below a thousand values."""

# One try per request here, ours around it: MLflow's own seven tries would take minutes.
_HTTP = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def default_tracking_uri(folder: Path) -> str:
    """``MLFLOW_TRACKING_URI``, else a sqlite file in the sweep's folder; absolute, as workers change directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(folder / _OWN_FILE).absolute()}"


def own_database(uri: str, folder: Path) -> Path | None:
    """The sweep's own MLflow database, which nobody else keeps, if that is what a tracking URI names."""
    own = (folder / _OWN_FILE).absolute()
    return own if sqlite_file(uri) == own else None


def make_client(uri: str) -> MlflowClient:
    """A client that fails fast when the server is away.

    Raises:
        ConfigError: Not a store that MLflow knows, or a database that it cannot use.
    """
    for name, value in _HTTP.items():
        os.environ.setdefault(name, value)
    store_scheme(uri)
    make_whole(uri)
    try:
        return MlflowClient(uri)
    except (MlflowException, SQLAlchemyError, CommandError) as error:
        shown, reason = (one_line(without_password(text), 400) for text in (uri, str(error)))
        raise ConfigError(
            f"MLflow cannot use {shown}: {reason}; where `mlflow db upgrade` does not help, move it away or choose "
            "another --tracking-uri: the study has everything"
        ) from None


def experiment_name(dataset: str) -> str:
    """All sweeps and final runs of a dataset are compared in one experiment."""
    return f"inflora-{dataset}"


def experiment_id(client: MlflowClient, dataset: str, objective: str) -> str:
    """A dataset's experiment, made if need be.

    A sqlite store keeps its artifacts beside its file, or in the folder that ``MLFLOW_DEFAULT_ARTIFACT_ROOT`` names, as
    MLflow's own server does: it must be seen from wherever a copy of the file will be looked at.
    """
    name = experiment_name(dataset)
    found = client.get_experiment_by_name(name)
    if found is not None:
        for tag, value in _ABOUT.items():
            if found.tags.get(tag, "") in _UNDECIDED:
                client.set_experiment_tag(found.experiment_id, tag, value)
        return found.experiment_id
    uri = client.tracking_uri
    beside = _artifacts(uri) if uri.startswith("sqlite:") else None
    tags = {
        "mlflow.experiment.primaryMetric.name": objective,
        "mlflow.experiment.primaryMetric.greaterIsBetter": "true",
        **_ABOUT,
    }
    return client.create_experiment(name, beside.as_uri() if beside else None, tags)


def _artifacts(uri: str) -> Path:
    named = os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT")
    return Path(named or Path(uri.removeprefix("sqlite:///")).absolute().parent / "artifacts").absolute()


def tag_of(study: optuna.Study) -> tuple[str, str]:
    """A tag that all runs of a study carry, and no others: the same sweep may have been begun anew, or elsewhere."""
    key = key_of(study)
    return ("inflora.study", key) if key else ("inflora.sweep", study.study_name)


def find_trial_run(uri: str, dataset: str, study: optuna.Study, number: int) -> str | None:
    """The run id of a sweep's trial, if MLflow has it; nothing is written.

    Raises:
        ConfigError: MLflow did not answer, or its database cannot be read.
    """
    reachable_store(uri)
    try:
        with _to_read(uri) as store:
            return None if store is None else _find_trial_run(make_client(store), dataset, study, number)
    except Exception as error:  # foreign bytes and a foreign server: what they raise is why there is no answer
        reason = without_password(f"{one_line(uri, 300)} does not answer: {one_line(str(error), 200)}")
        raise ConfigError(f"the tracking store {reason}") from None


def _find_trial_run(client: MlflowClient, dataset: str, study: optuna.Study, number: int) -> str | None:
    experiment = client.get_experiment_by_name(experiment_name(dataset))
    runs = tagged_runs(client, experiment.experiment_id, *tag_of(study)) if experiment else []
    return next((run.info.run_id for run in runs if run.data.tags.get("inflora.trial") == str(number)), None)


@contextmanager
def _to_read(uri: str) -> Iterator[str | None]:
    """A store to read from: of a database file a copy, as MLflow changes what it opens; None without runs."""
    file = sqlite_file(uri)
    if file is None:
        yield uri
        return
    if not file.exists():
        yield None
        return
    with closing(snapshot(file)) as memory, tempfile.TemporaryDirectory() as folder:
        is_made = memory.execute("SELECT 1 FROM sqlite_master WHERE name = 'runs'").fetchone()
        if not (is_made and memory.execute("SELECT 1 FROM runs LIMIT 1").fetchone()):
            yield None
            return
        copy = Path(folder) / "mlflow.db"
        with closing(sqlite3.connect(copy)) as target:
            memory.backup(target)
        yield f"sqlite:///{copy}"


def how_to_look(uri: str, dataset: str) -> list[str]:
    """The command to type, if any, and the page to open to see a dataset's runs; a password is left to be typed.

    MLflow 3.17 shows of an experiment what its address or else the browser's last choice says, tools for language
    models at first, whatever the experiment's tags say.
    """
    is_server = uri.startswith("http")
    shown = without_password(uri)
    command = [] if is_server else [f"mlflow ui --backend-store-uri {shlex.quote(shown)}"]
    server = shown.rstrip("/") if is_server else "http://127.0.0.1:5000"
    known = _find_experiment(uri, experiment_name(dataset))
    page = f"{server}/#/experiments/{known}?workflowType=machine_learning" if known else server
    return [*command, page]


def _find_experiment(uri: str, name: str) -> str | None:
    """An experiment's number, where a server or a database file says it at once."""
    try:
        if uri.startswith("http"):
            found = make_client(uri).get_experiment_by_name(name)
            return found.experiment_id if found else None
        file = sqlite_file(uri)
        if file is None or not file.exists():
            return None
        with closing(sqlite3.connect(file)) as database:
            row = database.execute("SELECT experiment_id FROM experiments WHERE name = ?", (name,)).fetchone()
        return str(row[0]) if row else None
    except (MlflowException, sqlite3.Error):
        return None


def how_to_export(folder: Path, uri: str, shown: str = "") -> str:
    """The command to type that writes the config of a sweep's best trial; ``shown`` is a shorter name of its folder.

    A password is left to be typed.
    """
    elsewhere = "" if uri == default_tracking_uri(folder) else f" --tracking-uri {shlex.quote(without_password(uri))}"
    return f"sweeps export {shlex.quote(shown or str(folder))} -o best.yaml{elsewhere}"


def flat_settings(config: RunConfig) -> dict[str, str]:
    """A config as MLflow parameters: dotted paths, as everywhere else."""

    def walk(prefix: str, node: Mapping[str, Any]) -> dict[str, str]:
        flat: dict[str, str] = {}
        for name, value in node.items():
            flat |= walk(f"{prefix}{name}.", value) if isinstance(value, dict) else {f"{prefix}{name}": str(value)}
        return flat

    return walk("", config.model_dump(mode="json", exclude={"provenance"}))


def git_commit() -> str | None:
    """The commit that this code is at, where it is itself a checkout (and not installed inside another one)."""
    here = Path(__file__)
    try:
        for command in (["ls-files", "--error-unmatch", here.name], ["rev-parse", "HEAD"]):
            done = subprocess.run(
                ["git", *command], cwd=here.parent, capture_output=True, text=True, check=True, timeout=10
            )
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def source_tags(program: str) -> dict[str, str]:
    """What a run was started by, as MLflow shows a run's source; a file beside this code by its place there."""
    here, file = Path(__file__).resolve().parents[3], Path(program).resolve()
    name = file.relative_to(here).as_posix() if file.is_relative_to(here) else str(file)
    tags = {"mlflow.source.name": name if file.is_file() else program, "mlflow.source.type": "LOCAL"}
    commit = git_commit()
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


def tagged_runs(client: MlflowClient, experiment: str, tag: str, value: str) -> list[Run]:
    """All runs of an experiment that carry a tag."""
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs([experiment], f"tags.`{tag}` = '{value}'", max_results=1000, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def params_of(config: RunConfig) -> list[Param]:
    """A config's settings as a run's parameters."""
    return [Param(name, value[:_PARAM_LENGTH]) for name, value in flat_settings(config).items()]


def params_of_sweep(sweep: Sweep) -> list[Param]:
    """A sweep as its run's parameters: its space, its budget, and the base of every trial.

    A searched setting stands under ``space/`` alone: the base's own value is no trial's, least of all the best's.
    """
    base = {f"base/{path}": value for path, value in flat_settings(sweep.base).items() if path not in sweep.space}
    space = {f"space/{path}": domain.model_dump_json(exclude_defaults=True) for path, domain in sweep.space.items()}
    budget = {f"budget/{name}": value for name, value in sweep.budget if value is not None}
    search = {"sampler": sweep.sampler, "early_stopping": sweep.early_stopping, "protocol": sweep.protocol}
    every = {**base, **space, **budget, **search, "budget/trials": sweep.trials}
    return [Param(name, str(value)[:_PARAM_LENGTH]) for name, value in every.items()]


def mlflow_metrics(
    tasks_done: int, metrics: Mapping[str, float], accuracies: Sequence[float], time_ms: int
) -> list[Metric]:
    """A task's metrics for MLflow; the same ``time_ms`` makes sending twice the same as once."""
    values = {**metrics, **{f"acc_on_task/{j + 1}": value for j, value in enumerate(accuracies)}}
    return [Metric(name, value, time_ms, tasks_done) for name, value in values.items()]


def log_all(
    client: MlflowClient,
    run_id: str,
    metrics: Sequence[Metric] = (),
    params: Sequence[Param] = (),
    tags: Sequence[RunTag] = (),
) -> None:
    """In one request, or in as few as MLflow's limit of a thousand values allows (a config has fewer)."""
    client.log_batch(run_id, metrics[:_BATCH], params, tags)
    for start in range(_BATCH, len(metrics), _BATCH):
        client.log_batch(run_id, metrics[start : start + _BATCH])


def log_accuracy(client: MlflowClient, run_id: str, matrix: Sequence[Sequence[float]], curve: Sequence[float]) -> None:
    """A run's accuracy matrix and curve."""
    client.log_text(run_id, json.dumps({"accuracy_matrix": matrix, "acc/seen": curve}), "accuracy.json")


def log_pictures(
    client: MlflowClient, run_id: str, matrix: Sequence[Sequence[float]], metrics: Sequence[Mapping[str, float]]
) -> None:
    """A run's accuracy and, from each task's metrics, what is known of its inside, as pictures.

    For runs that are few: drawing takes longer than all else that is logged.
    """
    curve = [known["acc/seen"] for known in metrics]
    client.log_figure(run_id, plots.accuracy_matrix(matrix), "accuracy_matrix.png")
    figure = plots.accuracy_curves({"all classes seen": [curve]}, "accuracy (%)")
    client.log_figure(run_id, figure, "accuracy_curve.png")
    for name, draw in {"memory": plots.memory, "drift": plots.drift}.items():
        picture = draw(metrics)
        if picture is not None:
            client.log_figure(run_id, picture, f"{name}.png")
