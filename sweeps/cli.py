"""``sweeps``, and ``main`` for the recipes."""

import logging
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import optuna
import typer
from mlflow.exceptions import MlflowException
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from inflora.cli import one_line_errors
from inflora.config import ConfigError, RunConfig, dump_config, explain, load_config, override, parse_assignments
from inflora.state import write_atomically
from sweeps.engine.export import export_config, find_best, sweep_records
from sweeps.engine.final import log_final, plan, summarise, train_all, write_report
from sweeps.engine.mlflow_store import default_tracking_uri, find_trial_run, how_to_look, make_client
from sweeps.engine.records import TrialRecord, best_record
from sweeps.engine.runner import connect, describe, run_sweep, say_to_stdout, slots
from sweeps.engine.spec import SPEC_FILE, Resources, Sweep, read_sweep

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Storage = Annotated[Path | None, typer.Option(help="Where sweeps are kept; default: $INFLORA_STORAGE or ./results.")]
TrackingUri = Annotated[
    str | None, typer.Option(help="MLflow store; default: $MLFLOW_TRACKING_URI or the sweep's own.")
]


@app.callback()
def _main() -> None:
    """Search, export and train: what comes after a recipe."""
    quiet_libraries()


def main(*sweeps: Sweep) -> None:
    """The command line of a recipe: run one of its sweeps (by default the first)."""
    by_name = {sweep.name: sweep for sweep in sweeps}

    def recipe(
        assignments: Annotated[
            list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="optim.epochs=5 ...")
        ] = None,
        name: Annotated[str, typer.Option("--sweep", help=f"One of: {', '.join(by_name)}.")] = sweeps[0].name,
        num_trials: Annotated[int | None, typer.Option(help="Trials in all, those already done included.")] = None,
        executor: Annotated[str | None, typer.Option(help="train (Ray Train) or inline (faster start).")] = None,
        storage: Storage = None,
        tracking_uri: TrackingUri = None,
        address: Annotated[
            str | None, typer.Option(help="Ray cluster; default: the one found, else this machine.")
        ] = None,
    ) -> None:
        quiet_libraries()
        with one_line_errors():
            if name not in by_name:
                raise ConfigError(f"unknown --sweep {name!r}; known: {', '.join(by_name)}")
            changes = {k: v for k, v in (("trials", num_trials), ("executor", executor)) if v is not None}
            base = override(by_name[name].base, parse_assignments(assignments or []))
            sweep = changed(by_name[name], {"base": base, **changes})
            folder = storage_root(storage) / sweep.name
            uri = tracking_uri or default_tracking_uri(folder)
            result = run_sweep(sweep, folder, uri, address=address, say=say_to_stdout)
        print_table(trials_table(sweep, result.records))
        _print_what_next(sweep, folder, uri, result.records)
        if not result.delivered:
            print(f"MLflow at {uri} has not taken everything; the same command sends the rest", file=sys.stderr)
        if not result.complete:
            print("interrupted; the same command goes on", file=sys.stderr)
            raise typer.Exit(130)
        if best_record(result.records) is None:
            raise typer.Exit(1)

    typer.run(recipe)


def quiet_libraries() -> None:
    """Optuna and MLflow tell of every database they open; a sweep's own lines say what matters."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def changed(sweep: Sweep, changes: Mapping[str, object]) -> Sweep:
    """The sweep with some fields replaced, checked again."""
    try:
        return Sweep.model_validate({**dict(sweep), **changes})
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def storage_root(storage: Path | None) -> Path:
    """The folder that holds one folder per sweep."""
    return (storage or Path(os.environ.get("INFLORA_STORAGE", "results"))).absolute()


def trials_table(sweep: Sweep, records: list[TrialRecord]) -> Table:
    """All trials, the best finished one first."""
    table = Table(title=f"{sweep.name}: {len(records)} trials, judged on validation images")
    for column in ("trial", "outcome", "tasks", *sweep.space, sweep.objective, "seconds"):
        table.add_column(column, justify="left" if column == "outcome" else "right")
    for record in sorted(records, key=lambda r: (-(r.value if r.value is not None else -1.0), r.number)):
        values = [record.settings.get(path, "") for path in sweep.space]
        settings = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
        seconds = sum(report.seconds for report in record.reports)
        value = f"{record.value:.4f}" if record.value is not None else ""
        table.add_row(str(record.number), record.outcome, str(len(record.reports)), *settings, value, f"{seconds:.0f}")
    return table


def print_table(table: Table) -> None:
    """As wide as the terminal; wide enough for every column where there is none."""
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)


def _print_what_next(sweep: Sweep, folder: Path, uri: str, records: list[TrialRecord]) -> None:
    best = best_record(records)
    if best is None:
        print("no trial has finished")
        return
    where = shlex.quote(os.path.relpath(folder))
    print(f"best: trial {best.number}  {describe(best.settings)}  {sweep.objective}={best.value:.4f}")
    elsewhere = "" if uri == default_tracking_uri(folder) else f" --tracking-uri {shlex.quote(uri)}"
    print(f"look at it:    {how_to_look(uri)}")
    print(f"export it:     sweeps export {where} -o best.yaml{elsewhere}")
    print("train with it: inflora train best.yaml   or   sweeps final best.yaml --seeds 0,1,2")


@app.command()
def export(
    sweep: Annotated[str, typer.Argument(help="A sweep's name in the storage folder, or its folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The config file to write.")] = Path("best.yaml"),
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Write the best finished trial as a config for final training."""
    with one_line_errors():
        folder = find_sweep(sweep, storage)
        spec = read_sweep(folder)
        records = sweep_records(spec, folder)
        best = find_best(spec, records)
        uri = tracking_uri or default_tracking_uri(folder)
        config = export_config(spec, best, len(records), _run_id(uri, spec, best.number))
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, dump_config(config).encode())
    print(f"{output}: trial {best.number} of {spec.name}")


def _run_id(uri: str, sweep: Sweep, number: int) -> str | None:
    """The trial's MLflow run; the study alone is enough to export, so a server that is away only costs this line."""
    try:
        return find_trial_run(uri, sweep.base.data.dataset, sweep.study_name, number)
    except MlflowException as error:
        print(f"MLflow at {uri} did not tell the run id: {str(error).splitlines()[0]}", file=sys.stderr)
        return None


def find_sweep(sweep: str, storage: Path | None) -> Path:
    """A sweep's folder, given as such or by the sweep's name."""
    as_folder = Path(sweep)
    return as_folder if (as_folder / SPEC_FILE).exists() else storage_root(storage) / sweep


@app.command()
def status(sweep: Annotated[str, typer.Argument(help="A sweep's name or folder.")], storage: Storage = None) -> None:
    """The trials of a sweep so far."""
    with one_line_errors():
        folder = find_sweep(sweep, storage)
        spec = read_sweep(folder)
        records = sweep_records(spec, folder)
    print_table(trials_table(spec, records))


@app.command()
def final(
    configs: Annotated[
        list[Path], typer.Argument(metavar="CONFIG...", help="Exported configs, compared side by side.")
    ],
    seeds: Annotated[str, typer.Option(help="Seeds to train each config with, comma-separated.")] = "0,1,2",
    out: Annotated[
        Path | None, typer.Option(help="Folder for runs and report; default: final/ in the storage.")
    ] = None,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default: the one found, else this machine.")] = None,
    cpus: Annotated[int, typer.Option(min=1, help="CPUs per run.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs per run; a fraction shares one.")] = 0.0,
) -> None:
    """Train the chosen configs over seeds on all training images, open the test set, report mean and spread."""
    with one_line_errors():
        folder = (out or storage_root(storage) / "final").absolute()
        runs = plan(labelled(configs), parse_seeds(seeds), folder)
        resources = Resources(cpus_per_worker=cpus, gpus_per_worker=gpus)
        uri = tracking_uri or default_tracking_uri(folder)
        make_client(uri)
        connect(address)
        slots(resources)
        train_all(runs, resources, say_to_stdout)
        summary = summarise(runs)
        report = write_report(runs, summary, folder)
    print(report.read_text())
    try:
        log_final(runs, summary, folder, uri)
    except MlflowException as error:
        print(f"MLflow has not taken everything ({error}); the same command sends the rest", file=sys.stderr)
        raise typer.Exit(1) from None
    print(f"report:     {report}\nlook at it: {how_to_look(uri)}")


def labelled(paths: list[Path]) -> dict[str, RunConfig]:
    """Configs by their method's name, or by their file's where two share a method.

    Raises:
        ConfigError: Two configs would bear the same name, or one that MLflow does not take.
    """
    configs = [(path, load_config(path)) for path in paths]
    methods = [config.method.name for _, config in configs]
    labels = [config.method.name if methods.count(config.method.name) == 1 else path.stem for path, config in configs]
    if len(set(labels)) < len(labels) or not all(re.fullmatch(r"[\w.-]+", label) for label in labels):
        raise ConfigError(f"configs of one method need different file names of letters, digits, . _ -, got {labels}")
    return {label: config for label, (_, config) in zip(labels, configs, strict=True)}


def parse_seeds(text: str) -> list[int]:
    """``"0,1,2"`` as numbers."""
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds must be different whole numbers from 0 on, separated by commas, got {text!r}")
    return seeds


if __name__ == "__main__":
    app()
