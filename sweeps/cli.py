"""The command ``sweeps``: what comes after a recipe.

Ray, MLflow, torch and Optuna are imported where a command needs them: help, a mistyped option and ``sweeps status``
must not wait for them.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inflora.config import ConfigError, checked, dump_config, parse_seeds
from inflora.console import OneLineGroup, Version, path
from inflora.errors import one_line, without_password
from sweeps.engine.ledger.records import BestBy
from sweeps.engine.space.spec import SPEC_FILE, Resources, Sweep

if TYPE_CHECKING:
    import optuna

    from sweeps.engine.after.transfer import Found, Transfer

app = typer.Typer(cls=OneLineGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Storage = Annotated[Path | None, typer.Option(help="Where sweeps are kept; default: $INFLORA_STORAGE or ./results.")]
TrackingUri = Annotated[
    str | None, typer.Option(help="MLflow store; default: $MLFLOW_TRACKING_URI or the sweep's own.")
]

SweepName = Annotated[
    str, typer.Argument(help="A sweep's name in the storage folder, its folder, or s3://bucket/path/name.")
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
def _main(version: Version = False) -> None:
    """Search, export and train: what comes after a recipe."""
    quiet_libraries()


def quiet_libraries() -> None:
    """Optuna and MLflow tell of every database they open; a sweep's own lines say what matters."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # read when MLflow is imported


def storage_root(storage: Path | None) -> Path:
    """The folder that holds one folder per sweep."""
    return (storage or Path(os.environ.get("INFLORA_STORAGE", "results"))).absolute()


@app.command("gpu-check")
def gpu_check(
    device: Annotated[str, typer.Option(help="cuda, or cpu for a rehearsal whose figures mean nothing.")] = "cuda",
    storage: Storage = None,
) -> None:
    """See whether everything that a sweep does works on this machine's GPU; under five minutes."""
    from sweeps.engine.run.gpu_check import ALL_CHECKS, check_gpu
    from sweeps.engine.run.runner import say_to_stdout

    if not check_gpu(device, storage_root(storage) / "gpu-check.log", say_to_stdout, ALL_CHECKS):
        raise typer.Exit(1)


@app.command("cluster-files")
def cluster_files(
    folder: Annotated[Path, typer.Argument(parser=path, help="A new folder.")] = Path("inflora-project"),
) -> None:
    """Write the installed project as a folder: cluster files, recipes and code; cluster/README.md goes on from it."""
    from sweeps.engine.run.project import lay_out

    lay_out(folder)
    print(f"{folder}: go there, and on with cluster/README.md")


@app.command()
def export(
    sweep: SweepName,
    output: Annotated[Path, typer.Option("-o", "--output", help="The config file to write.")] = Path("best.yaml"),
    best_by: Annotated[
        BestBy, typer.Option("--best", help="Choose the best trial by its estimated score, or by its own (observed).")
    ] = BestBy.ESTIMATE,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Write the best finished trial as a config for final training.

    A trial's own score is one draw, and the best of many draws flatters itself: the best is the one with the best
    estimate from all finished trials. With tradeoffs it is the one with the best objective.
    """
    from sweeps.engine.after.export import export_config, find_best, read_trials
    from sweeps.engine.ledger.reading import read_kept
    from sweeps.engine.show.mlflow_store import default_tracking_uri
    from sweeps.engine.show.output import check_output, deliver

    check_output(output, (".yaml", ".yml"))
    address = find_sweep(sweep, storage)
    spec, study, _ = read_kept(address)
    records, known = read_trials(spec, study)
    best = find_best(spec, records, known, best_by)
    uri = tracking_uri or default_tracking_uri(Path(address))
    config = export_config(spec, best, records, known, _run_id(uri, spec, study, best.number), best_by)
    deliver(output, dump_config(config), f"{output}: trial {best.number} of {spec.name}")


def _run_id(uri: str, sweep: Sweep, study: "optuna.Study", number: int) -> str | None:
    """The trial's MLflow run; the study alone is enough to export, so a server that is away only costs this line."""
    from sweeps.engine.show.mlflow_store import find_trial_run

    try:
        return find_trial_run(uri, sweep.base.data.dataset, study, number)
    except ConfigError as error:
        print(f"without the trial's MLflow run id: {error}", file=sys.stderr)
        return None


def front_of(sweep: Sweep, folder: Path) -> set[int]:
    """The trials on the Pareto front of a sweep with tradeoffs."""
    from sweeps.engine.ledger.study import load_study, pareto_front

    return pareto_front(load_study(sweep, folder)) if sweep.tradeoffs else set()


def find_sweep(sweep: str, storage: Path | None) -> str:
    """The address of a sweep's folder, given as such or by the sweep's name."""
    if "://" in sweep or (Path(sweep) / SPEC_FILE).exists():
        return sweep
    return str(storage_root(storage) / sweep)


@app.command()
def status(sweep: SweepName, storage: Storage = None) -> None:
    """The trials of a sweep so far, why some failed, where their logs are, and what is left of its budget."""
    from sweeps.engine.ledger.reading import read_kept
    from sweeps.engine.ledger.study import pareto_front
    from sweeps.engine.ledger.trials import read_records, validation_images
    from sweeps.engine.show.status import study_lines, trial_lines
    from sweeps.engine.show.tables import print_table, trials_table
    from sweeps.engine.space.estimate import estimate

    spec, study, driven = read_kept(find_sweep(sweep, storage))
    records = read_records(study)
    known = estimate(spec, records, validation_images(study))
    front = pareto_front(study) if spec.tradeoffs else set()
    print_table(trials_table(spec, records, known, front, driven=driven))
    lines = study_lines(spec, study, records, known, driven=driven)
    print("\n".join([*trial_lines(records, driven=driven), *lines]))


@app.command()
def report(
    sweep: SweepName,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="A page (.html), or its table of trials alone (.csv, .tex).")
    ] = Path("report.html"),
    storage: Storage = None,
) -> None:
    """Write a sweep as one HTML page: best config, trials, search, accuracies, failures, cost; or its table alone."""
    from sweeps.engine.after.export import read_trials
    from sweeps.engine.ledger.reading import read_kept
    from sweeps.engine.show.output import check_output, deliver
    from sweeps.engine.show.tables import csv_table, latex_table

    check_output(output, (".html", ".csv", ".tex"))
    spec, study, driven = read_kept(find_sweep(sweep, storage))
    match output.suffix.lower():
        case ".csv":
            deliver(output, csv_table(spec, *read_trials(spec, study)), f"{output}: a line for every trial")
        case ".tex":
            deliver(output, latex_table(spec, *read_trials(spec, study)), f"{output}: needs \\usepackage{{booktabs}}")
        case _:
            from sweeps.engine.show.report import page

            deliver(output, page(spec, study, driven=driven), f"{output}: open it in a browser")


@app.command()
def final(
    configs: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG... | SWEEP", help="Exported configs to compare, or a sweep to judge first."),
    ],
    seeds: Annotated[str, typer.Option(help="Seeds to train each config with, comma-separated.")] = "0,1,2",
    orders: Annotated[
        str,
        typer.Option(help="Class orders (seeds) to train on; default: a sweep's judge_orders, else each config's own."),
    ] = "",
    top: Annotated[int, typer.Option(min=1, help="Of a sweep: how many of its best trials are judged.")] = 3,
    on: Annotated[
        str | None,
        typer.Option(help="Another dataset for what a sweep has found: a preset, FILE.py[:SWEEP] or a config file."),
    ] = None,
    beside: Annotated[
        str | None, typer.Option(help="With --on: a sweep there (or its export), whose settings are judged too.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for runs and report; default: final/ in the sweep's folder, of configs in the storage."
        ),
    ] = None,
    shared: Annotated[
        str | None,
        typer.Option(
            help="Where no folder is seen by all nodes: s3://bucket/path for runs that are trained; "
            "default: $INFLORA_SHARED if that is a bucket."
        ),
    ] = None,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    address: Address = None,
    cpus: Annotated[int, typer.Option(min=1, help="CPUs per run.")] = 1,
    gpus: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs per run; a fraction shares one, 0 is the CPU. Default: 1 where there are some."),
    ] = None,
) -> None:
    """Train the chosen configs over seeds on all training images, open the test set, report mean and spread.

    Of a sweep, the best trials and the recipe's first setting are judged on validation images before, over the same
    seeds and orders; the test set is then opened for the winner and that first setting.

    With --on, the settings that one sweep (or its exported config) has found are put into another dataset's config and
    trained there, beside that dataset's own settings and those of a sweep there.
    """
    from mlflow.exceptions import MlflowException

    from sweeps.engine.after.final import FinalTraining, load_by_label, log_final, summarise, write_report
    from sweeps.engine.after.judge import judge_sweep
    from sweeps.engine.after.transferred import judge_transfer, values_of, write_transfer
    from sweeps.engine.run.reach import reachable_store
    from sweeps.engine.run.runner import say_to_stdout
    from sweeps.engine.show.mlflow_store import default_tracking_uri, how_to_look

    swept = _swept(configs[0], storage) if len(configs) == 1 else None
    home = home_of(swept, storage_root(storage))
    elsewhere = _elsewhere(configs, on, beside, storage)
    folder = (out or home / ("final" if elsewhere is None else f"final-on-{elsewhere.on}")).absolute()
    place = shared or os.environ.get("INFLORA_SHARED", "")
    if shared and "://" not in shared:
        raise ConfigError(
            f"--shared must be s3://bucket/path, got {one_line(shared, 200)!r}; a folder is given by --out"
        )
    bucket = None if "://" not in place else f"{place}/{home.name}" if swept else place
    resources = checked(Resources, {"cpus_per_worker": cpus, "gpus_per_worker": gpus or 0})
    numbers: list[int | None] | None = [*parse_seeds(orders, "--orders")] if orders else None
    trained = FinalTraining(parse_seeds(seeds), numbers, resources, address, bucket, gpus is None)
    uri = tracking_uri or default_tracking_uri(home if swept else folder)
    reachable_store(uri, home if swept else folder)
    if elsewhere:
        chosen = elsewhere.configs
    elif swept:
        chosen, trained = judge_sweep(swept, top, trained, folder, say_to_stdout)
    else:
        chosen = load_by_label([Path(config) for config in configs])
    runs = trained.train(chosen, folder, "test", say_to_stdout)
    summary = summarise(runs)
    written = write_report(runs, summary, folder)
    print(written.read_text())
    if elsewhere:
        print(write_transfer(elsewhere, judge_transfer(elsewhere, values_of(runs)), folder))
    try:
        log_final(runs, summary, folder, uri)
    except MlflowException as error:
        reason = without_password(str(error))
        print(f"MLflow has not taken everything ({reason}); the same command sends the rest", file=sys.stderr)
        raise typer.Exit(1) from None
    look = f"\n{' ' * 12}".join(how_to_look(uri, runs[0].config.data.dataset))
    print(f"report:     {written}\nlook at it: {look}")


def _swept(name: str, storage: Path | None) -> str | None:
    """The address of a sweep of that name, if it is one."""
    address = find_sweep(name, storage)
    return address if "://" in address or (Path(address) / SPEC_FILE).exists() else None


def _elsewhere(configs: list[str], on: str | None, beside: str | None, storage: Path | None) -> "Transfer | None":
    """The other dataset on which settings are judged, where one is named."""
    if on is None:
        if beside is not None:
            raise ConfigError("--beside goes with --on")
        return None
    if len(configs) > 1:
        raise ConfigError(f"--on takes one sweep or one exported config, got {len(configs)}")
    from sweeps.engine.after.transfer import found_by_sweep, found_in_config, plan_transfer

    def found(name: str) -> "Found":
        of_config = name.endswith((".yaml", ".yml"))
        return found_in_config(Path(name)) if of_config else found_by_sweep(find_sweep(name, storage))

    return plan_transfer(found(configs[0]), on, None if beside is None else found(beside))


def home_of(swept: str | None, storage: Path) -> Path:
    """The folder of what becomes of a sweep: its own, or where it would be on this machine if it is in a bucket."""
    if swept is None:
        return storage
    return storage / Path(swept).name if "://" in swept else Path(swept).absolute()


if __name__ == "__main__":
    app()
