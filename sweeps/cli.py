"""``sweeps``, and ``main`` for the recipes.

Ray, MLflow, torch and Optuna are imported where a command needs them: help, a mistyped option and ``sweeps status``
must not wait for them.
"""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from inflora.config import ConfigError, checked, dump_config, load_config, override, parse_assignments
from inflora.console import OneLineCommand, OneLineGroup
from inflora.errors import one_line
from sweeps.engine.records import Outcome, TrialRecord, best_record, describe, ranking
from sweeps.engine.spec import SPEC_FILE, Resources, Sweep, read_sweep

app = typer.Typer(cls=OneLineGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Storage = Annotated[Path | None, typer.Option(help="Where sweeps are kept; default: $INFLORA_STORAGE or ./results.")]
TrackingUri = Annotated[
    str | None, typer.Option(help="MLflow store; default: $MLFLOW_TRACKING_URI or the sweep's own.")
]

Address = Annotated[
    str | None, typer.Option(help="Ray cluster; default: $RAY_ADDRESS, else a Ray of its own on this machine.")
]

Shared = Annotated[
    str | None,
    typer.Option(
        help="Where all nodes find the trials, a folder or s3://bucket/path; "
        "default: $INFLORA_SHARED or the sweep's own folder."
    ),
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
        sampler: Annotated[str | None, typer.Option(help="tpe, gp, cmaes, random or grid.")] = None,
        early_stopping: Annotated[str | None, typer.Option(help="asha, median, hyperband or none.")] = None,
        time_budget: Annotated[str | None, typer.Option(help="Wall-clock time in all: 90 (seconds), 30m, 8h.")] = None,
        gpu_hours: Annotated[float | None, typer.Option(help="GPU-hours of training in all.")] = None,
        target: Annotated[float | None, typer.Option(help="Stop when a finished trial has this objective.")] = None,
        patience: Annotated[int | None, typer.Option(help="Stop when so many trials ended without a new best.")] = None,
        warm_start: Annotated[str | None, typer.Option(help="Try another sweep's three best settings first.")] = None,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Check everything, run one tiny trial, say what the sweep will take.")
        ] = False,
        executor: Annotated[str | None, typer.Option(help="train (Ray Train) or inline (faster start).")] = None,
        smoke: Annotated[
            bool, typer.Option("--smoke", help="The whole path in a minute: generated images, tiny model, CPU.")
        ] = False,
        storage: Storage = None,
        tracking_uri: TrackingUri = None,
        address: Address = None,
        shared: Shared = None,
        at_a_time: Annotated[
            int | None, typer.Option(min=1, help="Trials at a time; default: what the cluster has room for.")
        ] = None,
        workers: Annotated[int | None, typer.Option(help="Ray Train workers per trial.")] = None,
        cpus: Annotated[int | None, typer.Option(help="CPUs per worker.")] = None,
        gpus: Annotated[float | None, typer.Option(help="GPUs per worker; a fraction shares one.")] = None,
    ) -> None:
        quiet_libraries()
        if name not in by_name:
            raise ConfigError(f"unknown --sweep {name!r}; known: {', '.join(by_name)}")
        hours = None if time_budget is None else parse_duration_s(time_budget) / 3600
        limits = given(hours=hours, gpu_hours=gpu_hours, target=target, patience=patience)
        changes = given(trials=num_trials, executor=executor, sampler=sampler, early_stopping=early_stopping)
        changes["base"] = override(by_name[name].base, parse_assignments(assignments or []))
        resources = given(workers=workers, cpus_per_worker=cpus, gpus_per_worker=gpus)
        changes["resources"] = {**dict(by_name[name].resources), **resources}
        changes["budget"] = {**dict(by_name[name].budget), **limits}
        sweep = changed(by_name[name], changes)

        from sweeps.engine.cluster import Cluster
        from sweeps.engine.mlflow_store import default_tracking_uri
        from sweeps.engine.runner import run_sweep, say_to_stdout
        from sweeps.engine.tables import print_table, trials_table

        cluster = Cluster(address, shared or os.environ.get("INFLORA_SHARED"), at_a_time)
        if smoke:
            sweep = _sample_sweep(sweep, cluster.shared or str(storage_root(storage)))
        folder = storage_root(storage) / sweep.name
        uri = tracking_uri or default_tracking_uri(folder)
        if dry_run:
            from sweeps.engine.dryrun import dry_run as check_all

            check_all(sweep, folder, uri, cluster=cluster, say=say_to_stdout)
            return
        first = None if warm_start is None else best_settings(find_sweep(warm_start, storage))
        result = run_sweep(sweep, folder, uri, cluster=cluster, say=say_to_stdout, warm_start=first)
        if result.over:
            print(f"ended early: {result.over}")
        print_table(trials_table(sweep, result.records, front_of(sweep, folder)))
        _print_what_next(sweep, folder, uri, result.records)
        if not result.delivered:
            print(f"MLflow at {uri} has not taken everything; the same command sends the rest", file=sys.stderr)
        if not result.complete:
            print("interrupted; the same command goes on", file=sys.stderr)
            raise typer.Exit(130)
        if best_record(result.records) is None:
            raise typer.Exit(1)
        if smoke:
            _train_best(sweep, folder, result.records)

    program = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    program.command(cls=OneLineCommand)(recipe)
    program()


def _sample_sweep(sweep: Sweep, seen: str) -> Sweep:
    """The sweep in small; its images lie in ``seen``, a folder that all nodes see."""
    from sweeps.engine.smoke import in_small, prepare_sample

    if "://" in seen:
        raise ConfigError(f"--smoke writes its images where all nodes see them: --shared must be a folder, got {seen}")
    small = in_small(sweep, Path(seen).absolute() / "samples")
    prepare_sample(small)
    return small


def _train_best(sweep: Sweep, folder: Path, records: list[TrialRecord]) -> None:
    """What a user does with a finished sweep: export its best config and train with it."""
    from inflora.files import write_atomically
    from inflora.runs import train_into
    from sweeps.engine.export import export_config, find_best

    best = find_best(sweep, records)
    exported, out = folder / "best.yaml", folder / "trained"
    write_atomically(exported, dump_config(export_config(sweep, best, len(records), None)).encode())
    state = train_into(out, load_config(exported), "test", resume=(out / "state").exists())
    print(f"trained with {exported}: {state.metrics(state.tasks)['acc/final']:.4f} on test images")


def quiet_libraries() -> None:
    """Optuna and MLflow tell of every database they open; a sweep's own lines say what matters."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # read when MLflow is imported


def changed(sweep: Sweep, changes: Mapping[str, object]) -> Sweep:
    """The sweep with some fields replaced, checked again."""
    return checked(Sweep, {**dict(sweep), **changes})


def given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def parse_duration_s(text: str) -> float:
    """``"90"``, ``"90s"``, ``"30m"`` or ``"8h"`` in seconds."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smh]?)", text)
    if match is None or not float(match[1]):
        raise ConfigError(f"a time is given as 90 (seconds), 30m or 8h, got {text!r}")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def best_settings(folder: Path, count: int = 3) -> tuple[list[dict[str, Any]], str]:
    """The settings of a sweep's best trials, and the study they come from.

    Raises:
        ConfigError: No sweep is there, or no trial of it has finished.
    """
    from sweeps.engine.export import sweep_records

    other = read_sweep(folder)
    best = ranking(sweep_records(other, folder))[:count]
    if not best:
        raise ConfigError(f"--warm-start: no trial of {other.name} has finished yet")
    return [record.settings for record in best], other.study_name


def storage_root(storage: Path | None) -> Path:
    """The folder that holds one folder per sweep."""
    return (storage or Path(os.environ.get("INFLORA_STORAGE", "results"))).absolute()


def _print_what_next(sweep: Sweep, folder: Path, uri: str, records: list[TrialRecord]) -> None:
    from sweeps.engine.mlflow_store import default_tracking_uri, how_to_look

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


@app.command("gpu-check")
def gpu_check(
    device: Annotated[str, typer.Option(help="cuda, or cpu for a rehearsal whose figures mean nothing.")] = "cuda",
    storage: Storage = None,
) -> None:
    """See whether everything that a sweep does works on this machine's GPU; under five minutes."""
    from sweeps.engine.gpu_check import ALL_CHECKS, check_gpu
    from sweeps.engine.runner import say_to_stdout

    if not check_gpu(device, storage_root(storage) / "gpu-check.log", say_to_stdout, ALL_CHECKS):
        raise typer.Exit(1)


@app.command()
def export(
    sweep: Annotated[str, typer.Argument(help="A sweep's name in the storage folder, or its folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The config file to write.")] = Path("best.yaml"),
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Write the best finished trial as a config for final training."""
    from sweeps.engine.export import export_config, find_best, sweep_records
    from sweeps.engine.mlflow_store import default_tracking_uri
    from sweeps.engine.output import check_output, deliver

    check_output(output, (".yaml", ".yml"))
    folder = find_sweep(sweep, storage)
    spec = read_sweep(folder)
    records = sweep_records(spec, folder)
    best = find_best(spec, records)
    uri = tracking_uri or default_tracking_uri(folder)
    config = export_config(spec, best, len(records), _run_id(uri, spec, best.number))
    deliver(output, dump_config(config), f"{output}: trial {best.number} of {spec.name}")


def _run_id(uri: str, sweep: Sweep, number: int) -> str | None:
    """The trial's MLflow run; the study alone is enough to export, so a server that is away only costs this line."""
    from sweeps.engine.mlflow_store import find_trial_run

    try:
        return find_trial_run(uri, sweep.base.data.dataset, sweep.study_name, number)
    except ConfigError as error:
        print(f"without the trial's MLflow run id: {error}", file=sys.stderr)
        return None


def front_of(sweep: Sweep, folder: Path) -> set[int]:
    """The trials on the Pareto front of a sweep with tradeoffs."""
    from sweeps.engine.study import load_study, pareto_front

    return pareto_front(load_study(sweep, folder)) if sweep.tradeoffs else set()


def find_sweep(sweep: str, storage: Path | None) -> Path:
    """A sweep's folder, given as such or by the sweep's name."""
    as_folder = Path(sweep)
    return as_folder if (as_folder / SPEC_FILE).exists() else storage_root(storage) / sweep


@app.command()
def status(sweep: Annotated[str, typer.Argument(help="A sweep's name or folder.")], storage: Storage = None) -> None:
    """The trials of a sweep so far, why some failed, and what is left of its budget."""
    from sweeps.engine.budget import progress
    from sweeps.engine.snapshot import is_driven
    from sweeps.engine.study import hours_so_far, load_study, pareto_front, read_records
    from sweeps.engine.tables import print_table, trials_table

    folder = find_sweep(sweep, storage)
    spec = read_sweep(folder)
    study = load_study(spec, folder)
    records = read_records(study)
    front, driven = pareto_front(study) if spec.tradeoffs else set(), is_driven(folder)
    print_table(trials_table(spec, records, front, driven=driven))
    for record in records:
        if record.reason and record.outcome is Outcome.FAILED:
            tries = f" ({len(record.failures)} tries)" if len(record.failures) > 1 else ""
            print(f"trial {record.number} failed{tries}: {record.reason}")
    for line in progress(spec, records, hours_so_far(study), driven=driven):
        print(line)


@app.command()
def report(
    sweep: Annotated[str, typer.Argument(help="A sweep's name or folder.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="A page (.html), or its table of trials alone (.csv, .tex).")
    ] = Path("report.html"),
    storage: Storage = None,
) -> None:
    """Write a sweep as one HTML page: best config, trials, search, accuracies, failures, cost; or its table alone."""
    from sweeps.engine.output import check_output, deliver
    from sweeps.engine.snapshot import is_driven
    from sweeps.engine.study import load_study, read_records
    from sweeps.engine.tables import csv_table, latex_table

    check_output(output, (".html", ".csv", ".tex"))
    folder = find_sweep(sweep, storage)
    spec = read_sweep(folder)
    study = load_study(spec, folder)
    match output.suffix.lower():
        case ".csv":
            deliver(output, csv_table(spec, read_records(study)), f"{output}: a line for every trial")
        case ".tex":
            deliver(output, latex_table(spec, read_records(study)), f"{output}: needs \\usepackage{{booktabs}}")
        case _:
            from sweeps.engine.report import page

            content = page(spec, study, driven=is_driven(folder))
            deliver(output, content, f"{output}: open it in a browser")


@app.command()
def final(
    configs: Annotated[
        list[Path],
        typer.Argument(metavar="CONFIG... | SWEEP", help="Exported configs to compare, or a sweep to judge first."),
    ],
    seeds: Annotated[str, typer.Option(help="Seeds to train each config with, comma-separated.")] = "0,1,2",
    orders: Annotated[str, typer.Option(help="Class orders (seeds) to train on; default: each config's own.")] = "",
    top: Annotated[int, typer.Option(min=1, help="Of a sweep: how many of its best trials are judged.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="Folder for runs and report, seen by all nodes; default: final/ in the storage.")
    ] = None,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    address: Address = None,
    cpus: Annotated[int, typer.Option(min=1, help="CPUs per run.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs per run; a fraction shares one.")] = 0.0,
) -> None:
    """Train the chosen configs over seeds on all training images, open the test set, report mean and spread.

    Of a sweep, the best trials and the recipe's first setting are judged on validation images before, over the same
    seeds and orders; the test set is then opened for the winner and that first setting.
    """
    from mlflow.exceptions import MlflowException

    from sweeps.engine.final import Trained, labelled, log_final, summarise, write_report
    from sweeps.engine.judge import judge_sweep
    from sweeps.engine.mlflow_store import default_tracking_uri, how_to_look
    from sweeps.engine.reach import reachable_store
    from sweeps.engine.runner import say_to_stdout

    named = find_sweep(str(configs[0]), storage)
    swept = named if len(configs) == 1 and (named / SPEC_FILE).exists() else None
    folder = (out or (swept or storage_root(storage)) / "final").absolute()
    resources = checked(Resources, {"cpus_per_worker": cpus, "gpus_per_worker": gpus})
    numbers: list[int | None] | None = [*parse_seeds(orders, "--orders")] if orders else None
    trained = Trained(parse_seeds(seeds), numbers, resources, address)
    uri = tracking_uri or default_tracking_uri(swept or folder)
    reachable_store(uri, swept or folder)
    if swept:
        chosen, trained = judge_sweep(swept, top, trained, folder, say_to_stdout)
    else:
        chosen = labelled(configs)
    runs = trained.train(chosen, folder, "test", say_to_stdout)
    summary = summarise(runs)
    written = write_report(runs, summary, folder)
    print(written.read_text())
    try:
        log_final(runs, summary, folder, uri)
    except MlflowException as error:
        print(f"MLflow has not taken everything ({error}); the same command sends the rest", file=sys.stderr)
        raise typer.Exit(1) from None
    print(f"report:     {written}\nlook at it: {how_to_look(uri)}")


def parse_seeds(text: str, option: str = "--seeds") -> list[int]:
    """``"0,1,2"`` as numbers."""
    parts = [part.strip() for part in text.split(",")]
    seeds = [int(part) for part in parts if re.fullmatch(r"[0-9]{1,10}", part)]
    if len(seeds) < len(parts) or max(seeds) >= 2**32 or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"{option} must be different whole numbers from 0 to {2**32 - 1}, separated by commas, got "
            f"{one_line(text, 200)!r}"
        )
    return seeds


if __name__ == "__main__":
    app()
