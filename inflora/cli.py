"""``inflora``: one run, no Ray."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from inflora.config import (
    ConfigError,
    load_config,
    override,
    parse_assignments,
)
from inflora.continual import TaskResult
from inflora.data import ensure_store
from inflora.data.store import DataError, read_manifest
from inflora.data.stream import EvaluateOn
from inflora.metrics import Evaluation, accuracy_matrix, metrics_after, seen
from inflora.runs import train_into
from inflora.state import StateError
from inflora.training import EpochDone

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
data_app = typer.Typer(no_args_is_help=True, help="Datasets on this machine.")
app.add_typer(data_app, name="data")

UserError = (ConfigError, DataError, StateError, FloatingPointError, OSError)


@app.callback()
def _main() -> None:
    """Continual learning with interference-free low-rank adaptation."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What a user can mend ends the program with one line and exit code 2, without a traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


@app.command()
def train(
    config_file: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file with the run's settings.")],
    assignments: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="method.rank=8 ...")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the config, the state and the results.")] = Path("runs/train"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last finished task in --out.")] = False,
    evaluate_on: Annotated[str, typer.Option(help="test (final training) or validation (while choosing).")] = "test",
) -> None:
    """Learn the stream of tasks once, print the accuracies and keep the model."""
    with one_line_errors():
        config = override(load_config(config_file), parse_assignments(assignments or []))
        with _progress() as on_epoch:
            state = train_into(
                out, config, _parse_split(evaluate_on), resume=resume, on_task=_print_task, on_epoch=on_epoch
            )
    Console().print(accuracy_table(state.evaluations))
    for name, value in metrics_after(state.evaluations, state.tasks).items():
        print(f"{name:20} {value:.4f}")
    print(f"evaluated on {evaluate_on}; config, state and result are in {out}")


@data_app.command()
def info(name: str, root: Annotated[Path | None, typer.Option(help="Where the stores are.")] = None) -> None:
    """Counts, sizes and hashes of a dataset's store (prepared first where that needs no download)."""
    with one_line_errors():
        folder = ensure_store(name, root)
        manifest = read_manifest(folder)
    print(
        f"{name}: {len(manifest.classes)} classes, {manifest.height} x {manifest.width} x {manifest.channels}, {folder}"
    )
    print(f"made from {manifest.source}")
    for split, facts in manifest.splits.items():
        print(
            f"{split:6} {facts.images} images, {min(facts.per_class)} to {max(facts.per_class)} a class, {facts.sha256}"
        )


def accuracy_table(evaluations: Sequence[Evaluation]) -> Table:
    """The accuracy matrix: a row per task learnt, a column per task asked about."""
    matrix = accuracy_matrix(evaluations)
    table = Table(title="accuracy (%) after each task")
    table.add_column("after task", justify="right")
    for column in range(len(matrix)):
        table.add_column(f"on {column + 1}", justify="right")
    table.add_column("all seen", justify="right")
    for index, (row, evaluation) in enumerate(zip(matrix, evaluations, strict=True)):
        cells = [f"{100 * value:.1f}" for value in row] + [""] * (len(matrix) - len(row))
        table.add_row(str(index + 1), *cells, f"{100 * seen(evaluation):.1f}")
    return table


def _parse_split(name: str) -> EvaluateOn:
    if name == "test":
        return "test"
    if name == "validation":
        return "validation"
    raise ConfigError(f"--evaluate-on must be test or validation, got {name!r}")


def _print_task(result: TaskResult) -> None:
    print(
        f"task {result.task + 1}/{result.state.tasks} ({', '.join(result.classes)}): "
        f"all seen {100 * result.metrics['acc/seen']:.1f} %, this task {100 * result.metrics['acc/new']:.1f} %, "
        f"{result.seconds:.1f} s",
        flush=True,
    )


@contextmanager
def _progress() -> Iterator[Callable[[EpochDone], None]]:
    """A bar over the epochs of the current task on a terminal; nothing elsewhere (each task prints a line)."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    columns = (
        TextColumn("task {task.fields[number]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("epochs", number=1, loss=0.0)

        def on_epoch(done: EpochDone) -> None:
            progress.update(bar, completed=done.epoch, total=done.epochs, number=done.task + 1, loss=done.loss)

        yield on_epoch
