"""``inflora``: one run, no Ray.

The library is imported where a command needs it: help, and a line about a mistyped option, must not wait for torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from inflora.config import (
    METHODS,
    ConfigError,
    RunConfig,
    load_config,
    override,
    parse_assignments,
    parse_seeds,
    settings_of_method,
)
from inflora.config.listing import lines_of_settings
from inflora.console import OneLineGroup, Version, path
from inflora.errors import one_line
from inflora.metrics import ALIASES, Evaluation, accuracy_matrix, seen
from inflora.presets import PRESETS, comparison, find_preset

if TYPE_CHECKING:
    from inflora.continual import TaskResult
    from inflora.data.preparation import Progress as Preparing
    from inflora.data.store import Manifest
    from inflora.data.stream import EvaluateOn
    from inflora.training import EpochDone

app = typer.Typer(cls=OneLineGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
data_app = typer.Typer(no_args_is_help=True, help="Datasets on this machine.")
app.add_typer(data_app, name="data")


@app.callback()
def _main(version: Version = False) -> None:
    """Continual learning with interference-free low-rank adaptation."""


@app.command()
def train(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="A YAML file; adapter.rank=8 ...")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A published experiment, in place of CONFIG.")] = None,
    method: Annotated[str | None, typer.Option(help=f"A published pair: {', '.join(METHODS)}.")] = None,
    out: Annotated[Path, typer.Option(parser=path, help="Folder for config, state and results.")] = Path("runs/train"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last finished task in --out.")] = False,
    evaluate_on: Annotated[str, typer.Option(help="test (final training) or validation (while choosing).")] = "test",
) -> None:
    """Learn the stream of tasks once, print the accuracies and keep the model."""
    base, assignments = _base_config(arguments or [], preset)
    published = settings_of_method(method) if method else {}
    config = override(base, {**published, **parse_assignments(assignments)})
    split = _parse_split(evaluate_on)
    from inflora.data.tasks import in_numbers, name_of_stream
    from inflora.runs import train_into

    config = in_numbers(config)
    with _progress() as on_epoch:
        state = train_into(out, config, split, resume=resume, on_task=_print_task, on_epoch=on_epoch)
    Console().print(accuracy_table(state.evaluations))
    metrics = state.metrics(state.tasks_done)
    for name, value in metrics.items():
        if not name.startswith(("memory/", "drift/task")):  # many: they are in result.json
            print(f"{name:26} {value:,.0f}" if name.startswith(("params/", "precision/")) else f"{name:26} {value:.4f}")
    stream = name_of_stream(config.data, len(state.data.classes) if state.data else 0)
    print(f"evaluated on {evaluate_on}, stream {stream}; config, state and result are in {out}")
    if preset:
        for line in beside_published(preset, config, evaluate_on, metrics):
            print(line)


def _base_config(arguments: list[str], preset: str | None) -> tuple[RunConfig, list[str]]:
    """The config to start from, and the assignments to change it with."""
    if preset:
        return find_preset(preset).config, arguments
    if not arguments or "=" in arguments[0]:
        raise ConfigError(f"give a CONFIG file or --preset, one of {', '.join(PRESETS)}")
    return load_config(Path(arguments[0])), arguments[1:]


def beside_published(preset: str, config: RunConfig, evaluate_on: str, metrics: Mapping[str, float]) -> list[str]:
    """Set a preset's result beside the published one, or say why they cannot be compared."""
    from inflora.reproduce import why_incomparable

    if why := why_incomparable(preset, config, evaluate_on):
        return [f"not compared with the published {preset}: {why}"]
    experiment = find_preset(preset)
    if not experiment.published:
        return [f"no published numbers of {preset} are known here"]
    final, average = 100 * metrics["acc/final"], 100 * metrics["acc/avg_incremental"]
    return [line for published in experiment.published for line in comparison(published, final, average)]


@app.command("reproduce")
def reproduce_command(
    arguments: Annotated[
        list[str], typer.Argument(metavar="PRESET [KEY=VALUE]...", help="A published experiment; data.root=/data ...")
    ],
    seeds: Annotated[str, typer.Option(help="Seeds to train it with, comma-separated.")] = "0,1,2",
    out: Annotated[
        Path | None, typer.Option(parser=path, help="Folder for all of it; default: runs/reproduce/PRESET.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Train nothing: print the page that says what to type and what to expect.")
    ] = False,
) -> None:
    """Train a published experiment over seeds; write one folder that shows what was done and what came of it.

    README.md in it is the page, summary.json has all numbers, hashes and versions. Typed again it goes on after any
    stop, and trains no seed twice. All but runs/ is small: who gets it can check it, and take it into a table with
    ``inflora collect``.
    """
    preset, *assignments = arguments
    find_preset(preset)
    changes, numbers = parse_assignments(assignments), parse_seeds(seeds)
    if plan:
        from inflora.reproduction import plan as planned

        print(planned(preset), end="")
        return
    from inflora.reproduce import how_to_send, reproduce
    from inflora.reproduction import PAGE, results

    folder = out or Path("runs/reproduce") / preset
    with _progress() as on_epoch:
        found = reproduce(preset, changes, numbers, folder, on_epoch=on_epoch)
    print("\n".join(["", *results(found), "", f"page: {folder / PAGE}", f"send it: {how_to_send(folder)}"]))


@app.command()
def collect(
    folder: Annotated[Path, typer.Argument(help="Reproductions side by side, as docs/results.")],
    given: Annotated[
        list[Path] | None, typer.Argument(metavar="[REPRODUCTION]...", help="Folders of inflora reproduce to take in.")
    ] = None,
) -> None:
    """Take reproductions into a folder; write their pages anew from their numbers, and one table of all."""
    from inflora.collection import TABLE
    from inflora.collection import collect as collected

    print(collected(folder, given or []))
    print(f"table: {folder / TABLE}")


@app.command("predict")
def predict_command(
    model: Annotated[Path, typer.Argument(help="A run's folder: what train --out has written.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, and folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="So many of the most probable classes.")] = 1,
    invert: Annotated[bool, typer.Option("--invert", help="Read negatives: for dark ink on white paper.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help='An object a line: "file", "classes" or "error".')] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="A table: file,class,probability.")] = False,
) -> None:
    """Say what images show: a line per image with its file, and classes with their probabilities.

    Images must look like those that the model was trained on: one trained on light digits on a dark ground (as all
    common sets of digits have them) is wrong of dark ink on white paper without --invert. An image that seems to be a
    negative is warned of. What cannot be read is said, the other images are answered, and the exit code is 2.
    """
    if as_json and as_csv:
        raise ConfigError("choose --json or --csv")
    from inflora.predictions import images_in, print_predictions
    from inflora.serving import load, predict

    answers = predict(load(model), images_in(images), top, invert=invert)
    if not print_predictions(answers, "json" if as_json else "csv" if as_csv else "text", inverted=invert):
        raise typer.Exit(2)


@app.command()
def settings(
    name: Annotated[str | None, typer.Argument(help="Only the settings of this adapter or classifier.")] = None,
) -> None:
    """List every setting: its dotted path, type, default, what is allowed and what it does."""
    for line in lines_of_settings(name):
        print(line)


@app.command()
def metrics() -> None:
    """List the metrics by their names here and in papers, with formulas."""
    for here, field, formula, note in ALIASES:
        print(f"{here:26} {field}\n{'':26} = {formula}" + (f"\n{'':26} {note}" if note else ""))


@data_app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="A known dataset, or a name of your own with --format.")],
    source: Annotated[Path, typer.Option(parser=path, help="What its authors distribute: an archive or a folder.")],
    root: Annotated[str | None, typer.Option(help="Folder or URI (s3://...) for stores.")] = None,
    format_: Annotated[str | None, typer.Option("--format", help="The known dataset it is laid out as.")] = None,
    shorter_side: Annotated[int | None, typer.Option(min=1, help="Decode once, shrunk to this.")] = None,
    split_seed: Annotated[int | None, typer.Option(min=0, help="Draws test images of unsplit datasets.")] = None,
    test_list: Annotated[Path | None, typer.Option(parser=path, help="File with the names of the test images.")] = None,
    domains: Annotated[str | None, typer.Option(help="Some of the domains, in this order: clipart,real")] = None,
    subset: Annotated[bool, typer.Option("--subset", help="Accept other numbers of images than the official.")] = False,
) -> None:
    """Read a dataset once and write its store; verifies one that is there, goes on where it was interrupted."""
    from inflora.data import known_dataset, prepare_store
    from inflora.data.source import Options

    form = name if format_ is None else format_
    dataset = known_dataset(form)
    if dataset.needs is None:
        raise ConfigError(f"{form} comes with the installation: nothing is to be prepared")
    listed = domains if domains is None else tuple(domains.split(","))
    chosen = {"split_seed": split_seed, "test_list": test_list, "domains": listed}
    given: dict[str, Any] = {option: value for option, value in chosen.items() if value is not None}
    if foreign := sorted(given.keys() - dataset.options):
        knows = ", ".join(map(_flag, sorted(dataset.options))) or "none"
        raise ConfigError(f"{_flag(foreign[0])} is no option of {form}; its options: {knows}")
    with _preparing() as on_progress:
        folder = prepare_store(
            name, dataset, source, Options(**given), root, shorter_side, subset=subset, on_progress=on_progress
        )
    _print_manifest(folder)
    print(f"use it with data.dataset={name}" + (f" data.root={root}" if root else ""))


@data_app.command()
def info(
    name: str,
    root: Annotated[str | None, typer.Option(help="Folder or URI (s3://...) of the stores.")] = None,
    sheet: Annotated[Path | None, typer.Option(parser=path, help="Write a contact sheet of training images.")] = None,
    classes: Annotated[bool, typer.Option("--classes", help="List the counts of every class.")] = False,
) -> None:
    """Check a dataset's store and show what is in it (prepared first where that needs no download)."""
    from inflora.data import ensure_store
    from inflora.data.sheet import check_sheet, contact_sheet
    from inflora.data.store import open_split, verify_split

    if sheet:
        check_sheet(sheet)
    folder = ensure_store(name, root)
    manifest = _print_manifest(folder)
    for split in manifest.splits:
        verify_split(folder, split)
    if classes:
        for label, class_name in enumerate(manifest.classes):
            counts = ", ".join(f"{facts.per_class[label]} {split}" for split, facts in manifest.splits.items())
            print(f"{label:4} {one_line(class_name)}: {counts}")
    if sheet:
        contact_sheet(open_split(folder, "train"), manifest.classes).save(sheet)
        print(f"contact sheet: {sheet}")


def _print_manifest(folder: Path) -> Manifest:
    import torch

    from inflora.data.store import open_split, read_manifest

    manifest = read_manifest(folder)
    shown = f"{len(manifest.classes)} classes" + (f", {len(manifest.domains)} domains" if manifest.domains else "")
    pixels = open_split(folder, "train").pixels
    sizes = pixels.sizes(torch.arange(len(pixels)))
    low, high = sizes.amin(0).tolist(), sizes.amax(0).tolist()
    size = " x ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(low, high, strict=True))
    print(f"{manifest.dataset}: {shown}, {size} pixels x {manifest.channels}, stored {manifest.form}, {folder}")
    print(f"made from {one_line(manifest.source)}")
    print(f"content {manifest.content_hash}")
    for split, facts in manifest.splits.items():
        few, many = min(facts.per_class), max(facts.per_class)
        print(f"{split:6} {facts.images} images, {few} to {many} a class, content {facts.content_hash}")
    return manifest


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


@contextmanager
def _preparing() -> Iterator[Callable[[Preparing], None]]:
    """A bar over a split's images on a terminal, some lines elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda at: print(f"{at.split}: {at.done} of {at.images} images", file=sys.stderr, flush=True)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bars: dict[str, TaskID] = {}

        def on_progress(at: Preparing) -> None:
            if at.split not in bars:
                bars[at.split] = progress.add_task(at.split)
            progress.update(bars[at.split], completed=at.done, total=at.images)

        yield on_progress


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
        f"task {result.task + 1}/{result.state.tasks} ({one_line(', '.join(result.classes))}): "
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
        TextColumn("loss {task.fields[loss]:.3f}, waiting for data {task.fields[data_wait]:.0%}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("epochs", number=1, loss=0.0, data_wait=0.0)

        def on_epoch(done: EpochDone) -> None:
            shown: dict[str, Any] = {"number": done.task + 1, "loss": done.loss, "data_wait": done.data_wait}
            progress.update(bar, completed=done.epoch, total=done.epochs, **shown)

        yield on_epoch
