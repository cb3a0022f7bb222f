"""A recipe's vocabulary and its command line: ``main(Sweep(...))`` makes the file that calls it a program."""

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from inflora.config import ConfigError, checked, dump_config, load_config, override, parse_assignments, parse_duration_s
from inflora.console import OneLineCommand
from inflora.errors import without_password
from inflora.interrupt import INTERRUPTED
from sweeps.cli import Address, Shared, Storage, TrackingUri, find_sweep, front_of, quiet_libraries, storage_root
from sweeps.engine.ledger.records import TrialRecord, describe
from sweeps.engine.space.domains import Choice, Integer, NearOne, Real
from sweeps.engine.space.estimate import Estimates, estimate, winner
from sweeps.engine.space.spec import Budget, Constraint, Resources, Sweep

__all__ = ["Budget", "Choice", "Constraint", "Integer", "NearOne", "Real", "Resources", "Sweep", "main"]


def main(*sweeps: Sweep) -> None:
    """The command line of a recipe: run one of its sweeps (by default the first)."""
    command_line(*sweeps)()


def command_line(*sweeps: Sweep) -> typer.Typer:
    """The program that ``main`` runs."""
    by_name = {sweep.name: sweep for sweep in sweeps}

    def recipe(
        assignments: Annotated[
            list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="optim.epochs=5 ...")
        ] = None,
        name: Annotated[str, typer.Option("--sweep", help=f"One of: {', '.join(by_name)}.")] = sweeps[0].name,
        num_trials: Annotated[int | None, typer.Option(help="Trials in all, those already done included.")] = None,
        sampler: Annotated[str | None, typer.Option(help="gp, tpe, cmaes, random or grid.")] = None,
        early_stopping: Annotated[str | None, typer.Option(help="none, asha, median or hyperband.")] = None,
        time_budget: Annotated[str | None, typer.Option(help="Wall-clock time in all: 90 (seconds), 30m, 8h.")] = None,
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
        study: Annotated[
            str | None,
            typer.Option(help="postgresql://user@host/database for the study; default: $INFLORA_STUDY or a file."),
        ] = None,
        at_a_time: Annotated[
            int | None, typer.Option(min=1, help="Trials at a time; default: what the cluster has room for.")
        ] = None,
        workers: Annotated[int | None, typer.Option(help="Ray Train workers per trial.")] = None,
        cpus: Annotated[int | None, typer.Option(help="CPUs per worker.")] = None,
        gpus: Annotated[
            float | None, typer.Option(help="GPUs per worker; a fraction shares one, 0 is the CPU.")
        ] = None,
        **budget: Any,
    ) -> None:
        quiet_libraries()
        if name not in by_name:
            raise ConfigError(f"unknown --sweep {name!r}; known: {', '.join(by_name)}")
        hours = None if time_budget is None else parse_duration_s(time_budget) / 3600
        limits = without_none(hours=hours, **budget)
        changes = without_none(trials=num_trials, executor=executor, sampler=sampler, early_stopping=early_stopping)
        changes["base"] = override(by_name[name].base, parse_assignments(assignments or []))
        resources = without_none(workers=workers, cpus_per_worker=cpus, gpus_per_worker=gpus)
        changes["resources"] = {**dict(by_name[name].resources), **resources}
        changes["budget"] = {**dict(by_name[name].budget), **limits}
        sweep = replaced(by_name[name], changes)

        from inflora.data.tasks import in_numbers
        from sweeps.engine.after.export import best_settings
        from sweeps.engine.run.cluster import Cluster
        from sweeps.engine.run.runner import run_sweep, say_to_stdout
        from sweeps.engine.show.mlflow_store import default_tracking_uri
        from sweeps.engine.show.tables import print_table, trials_table

        given = os.environ.get
        cluster = Cluster(address, shared or given("INFLORA_SHARED"), at_a_time, study or given("INFLORA_STUDY"))
        if smoke:
            sweep = _sample_sweep(sweep, cluster.shared or str(storage_root(storage)))
        sweep = replaced(sweep, {"base": in_numbers(sweep.base)})
        folder = storage_root(storage) / sweep.name
        uri = tracking_uri or default_tracking_uri(folder)
        if dry_run:
            from sweeps.engine.run.dry_run import dry_run as check_all

            check_all(sweep, folder, uri, cluster=cluster, say=say_to_stdout)
            return
        first = None if warm_start is None else best_settings(find_sweep(warm_start, storage))
        result = run_sweep(sweep, folder, uri, cluster=cluster, say=say_to_stdout, warm_start=first)
        if result.over:
            print(f"ended early: {result.over}")
        known = estimate(sweep, result.records, result.images)
        print_table(trials_table(sweep, result.records, known, front_of(sweep, folder)))
        _print_what_next(sweep, folder, uri, result.records, known)
        if not result.delivered:
            shown = without_password(uri)
            print(f"MLflow at {shown} has not taken everything; the same command sends the rest", file=sys.stderr)
        if not result.complete:
            print("interrupted; the same command goes on", file=sys.stderr)
            raise typer.Exit(INTERRUPTED)
        if winner(result.records, known) is None:
            raise typer.Exit(1)
        if smoke:
            _train_best(sweep, folder, result.records, known)
        if not result.delivered:
            raise typer.Exit(1)

    program = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    program.command(cls=OneLineCommand)(with_budget_options(recipe))
    return program


def with_budget_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for every field of ``Budget`` in the place of its ``**budget``.

    Hours have one already, ``--time-budget``, which also takes minutes.
    """
    signature = inspect.signature(command)
    own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    options = []
    for name, field in Budget.model_fields.items():
        # A field is an Annotated number or None; the bounds in it are checked with the whole sweep.
        annotated, _ = get_args(field.annotation)
        shown = typer.Option(help=f"Stop after: {field.description}.")
        kind = Annotated[get_args(annotated)[0] | None, shown]  # type: ignore[valid-type]
        options.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    own += [option for option in options if option.name != "hours"]
    command.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    return command


def _sample_sweep(sweep: Sweep, seen: str) -> Sweep:
    """The sweep in small; its images lie in ``seen``, a folder that all nodes see."""
    from sweeps.engine.run.smoke import prepare_sample, shrink

    if "://" in seen:
        raise ConfigError(f"--smoke writes its images where all nodes see them: --shared must be a folder, got {seen}")
    small = shrink(sweep, Path(seen).absolute() / "samples")
    prepare_sample(small)
    return small


def _train_best(sweep: Sweep, folder: Path, records: list[TrialRecord], known: Estimates | None) -> None:
    """Export the best config of a finished sweep and train with it, as a user does."""
    from inflora.files import write_atomically
    from inflora.runs import train_into
    from sweeps.engine.after.export import export_config, find_best

    best = find_best(sweep, records, known)
    exported, out = folder / "best.yaml", folder / "trained"
    write_atomically(exported, dump_config(export_config(sweep, best, records, known, None)).encode())
    state = train_into(out, load_config(exported), "test", resume=(out / "state").exists())
    print(f"trained with {exported}: {state.metrics(state.tasks)['acc/final']:.4f} on test images")


def replaced(sweep: Sweep, changes: Mapping[str, object]) -> Sweep:
    """The sweep with some fields replaced, checked again."""
    return checked(Sweep, {**dict(sweep), **changes})


def without_none(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _print_what_next(sweep: Sweep, folder: Path, uri: str, records: list[TrialRecord], known: Estimates | None) -> None:
    from sweeps.engine.show.mlflow_store import how_to_export, how_to_look

    best = winner(records, known)
    if best is None:
        print("no trial has finished")
        return
    told = f", estimated {known.of_trials()[best.number]}" if known else ""
    print(f"best: trial {best.number}  {describe(best.settings)}  {sweep.objective}={best.value:.4f}{told}")
    print("look at it:   ", f"\n{' ' * 15}".join(how_to_look(uri, sweep.base.data.dataset)))
    print(f"export it:     {how_to_export(folder, uri, os.path.relpath(folder))}")
    print("train with it: inflora train best.yaml   or   sweeps final best.yaml --seeds 0,1,2")
