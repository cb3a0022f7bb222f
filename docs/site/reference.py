"""The reference's pages, written from settings, commands and docstrings whenever the site is built."""

from collections.abc import Callable, Iterable

import typer
from pydantic import BaseModel
from typer.cli import get_docs_for_click
from typer.main import get_command

from inflora import cli as inflora_cli
from inflora.config import ADAPTERS, CLASSIFIERS, RunConfig
from inflora.config.listing import Setting, all_settings, settings_of
from inflora.config.messages import groups_of, is_model
from sweeps import cli as sweeps_cli
from sweeps import digits
from sweeps.engine.space.domains import Choice, Integer, NearOne, Real
from sweeps.engine.space.spec import Budget, Constraint, Resources, Sweep
from sweeps.recipe import command_line

PYTHON = {
    "A finished run": ("inflora.load", "inflora.serving.load", "inflora.serving.predict"),
    "Training": (
        "inflora.config.reading.load_config",
        "inflora.config.reading.parse_config",
        "inflora.config.reading.override",
        "inflora.runs.train_into",
        "inflora.continual.run",
        "inflora.continual.TaskResult",
        "inflora.metrics",
    ),
    "Searching": (
        "sweeps.recipe.main",
        "sweeps.engine.run.runner.run_sweep",
        "sweeps.engine.run.runner.SweepResult",
        "sweeps.engine.ledger.records.TrialRecord",
        "sweeps.engine.show.report",
    ),
    "Adding an adapter": (
        "inflora.adapters.base.Adapter",
        "inflora.adapters.lora.TrainedLoRA",
        "inflora.lora",
        "inflora.task_data.TaskData",
        "inflora.config.alternatives.Alternative",
    ),
    "Adding a classifier": (
        "inflora.classifiers.base.Classifier",
        "inflora.classifiers.fitted.Fitted",
        "inflora.classifiers.fitted.Means",
        "inflora.features.Features",
    ),
    "Adding a dataset": ("inflora.data.source",),
}
"""Heading -> functions and classes, and modules with all that is public in them."""


def run_settings() -> str:
    """Every setting of a run with its default, what is allowed and what it means."""
    found = all_settings()
    parts = [
        "# Settings of a run",
        "A setting's dotted path is its name in YAML, on the command line (`adapter.rank=8`), in a search space, in "
        "Optuna, in MLflow and in the exported file. `inflora settings` prints the same list.",
    ]
    for name, model in {"run": RunConfig, **_groups(RunConfig)}.items():
        own = [each for each in found if not each.choice and _group(each) == name]
        parts += [f"## {name}", _said_of(model), _table(own)]
    for kind, models in {"adapter": ADAPTERS, "classifier": CLASSIFIERS}.items():
        for name, chosen in models.items():
            own = [each for each in found if each.choice == f"{kind}.name={name}"]
            parts += [f"## {kind}: {name}", _said_of(chosen), _table(own)]
    return _page(parts)


def _groups(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The fields of a model that are groups of settings, and no choice between some."""
    fields = model.model_fields.items()
    return {name: field.annotation for name, field in fields if is_model(field.annotation) and not groups_of(field)}


def _group(setting: Setting) -> str:
    head = setting.path.partition(".")[0]
    return head if head in _groups(RunConfig) else "run"


def sweep_settings() -> str:
    """Every value that a recipe may give."""
    parts = [
        "# Settings of a sweep",
        "The values of a recipe (`from sweeps.recipe import Sweep, Budget, Integer`). Most have an option on the "
        "recipe's [command line](recipe.md) too. `base` is a `RunConfig`: the [settings of a run](run-settings.md).",
    ]
    groups = tuple(f"{name}." for name in _groups(Sweep))
    parts += ["## Sweep", _said_of(Sweep), _table(s for s in settings_of(Sweep) if not s.path.startswith(groups))]
    for model in (Budget, Resources, Constraint, Integer, Real, NearOne, Choice):
        parts += [f"## {model.__name__}", _said_of(model), _table(s for s in settings_of(model) if s.path != "kind")]
    return _page(parts)


def command_page(name: str, program: typer.Typer) -> str:
    """A program's commands, as Typer tells of them."""
    command = get_command(program)
    told = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name=name), name=name)
    return f"{told.strip()}\n"


def python_page() -> str:
    """What code outside this project calls or derives from; mkdocstrings fills it in."""
    parts = ["# Python", "What scripts call, and what adapters, classifiers and datasets of your own derive from."]
    for heading, names in PYTHON.items():
        parts += [f"## {heading}", *(f"::: {name}" for name in names)]
    return _page(parts)


PAGES: dict[str, Callable[[], str]] = {
    "reference/run-settings.md": run_settings,
    "reference/sweep-settings.md": sweep_settings,
    "reference/inflora.md": lambda: command_page("inflora", inflora_cli.app),
    "reference/sweeps.md": lambda: command_page("sweeps", sweeps_cli.app),
    "reference/recipe.md": lambda: command_page("python sweeps/digits.py", command_line(digits.inflora)),
    "reference/python.md": python_page,
}


def _said_of(model: type[BaseModel]) -> str:
    """The docstring of a model, with its code in Markdown's quotes."""
    return (model.__doc__ or "").replace("``", "`").strip().replace("\n    ", "\n")


def _table(settings: Iterable[Setting]) -> str:
    """A table; on a telephone site.css puts the cells of a row below each other."""
    rows = [("setting", "default", "meaning", "allowed"), ("---",) * 4]
    rows += [(f"`{path}`", f"`{default}`", meaning, allowed) for path, allowed, default, meaning, _ in settings]
    lines = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows]
    return "\n".join(['<div class="settings" markdown>', "", *lines, "", "</div>"])


def _page(parts: Iterable[str]) -> str:
    return "\n\n".join(parts) + "\n"
