"""A reproduction: a preset over several seeds as a value, and its page.

All that a page says is in the ``summary.json`` beside it: a page is never evidence of its own.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    ValidationError,
    field_serializer,
    model_validator,
)

from inflora.config import ConfigError, RunConfig, config_hash, parse_config
from inflora.config.messages import explain
from inflora.data import DATASETS
from inflora.errors import one_line
from inflora.files import read_regular, write_atomically
from inflora.metrics import spread
from inflora.presets import Published, expected_range, find_preset

SUMMARY, PAGE = "summary.json", "README.md"
SEEDS = (0, 1, 2)
SHOWN = {
    "acc/final": "accuracy over all test images after the last task",
    "acc/avg_incremental": "mean over tasks of the accuracy over all classes seen",
    "forgetting": "mean over old tasks of their best accuracy so far minus their last",
    "acc/task_aware": "final accuracy when the task of each image is known",
}
_FACTS = {
    "dataset": "dataset",
    "dataset_hash": "its images and labels",
    "split_hash": "split into training and validation images",
    "class_order": "class order",
    "backbone_hash": "backbone",
    "inflora-sweeps": "inflora-sweeps",
    "source": "its source files",
    "torch": "torch",
    "timm": "timm",
    "python": "python",
    "machine": "machine",
}
Line = Annotated[str, Field(max_length=10_000, pattern=r"^[^|<>`\n\r]*$")]
"""What stands in a page as it is: whoever has sent it writes a line there, and nothing else."""
_MOST = 16_000_000
"""Bytes of a summary that is read; a hundred seeds of fifty tasks have a tenth."""


class Run(BaseModel):
    """One seed: metrics, accuracy matrix and all that the numbers depend on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int
    metrics: dict[str, FiniteFloat]
    accuracy_matrix: list[list[FiniteFloat]] = Field(min_length=1)
    identity: dict[str, Line]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if any(len(row) != done for done, row in enumerate(self.accuracy_matrix, 1)):
            raise ValueError("accuracy_matrix must have a row for each task, with an accuracy for each one learnt")
        if missing := SHOWN.keys() - self.metrics.keys():
            raise ValueError(f"metrics must have {', '.join(sorted(missing))}")
        return self


class Reproduction(BaseModel):
    """A preset over seeds, as it is kept in ``summary.json``; its config names no place of a machine.

    ``changes`` are the settings that were given besides the preset; ``incomparable`` says why its numbers are not to be
    held against the ``published`` ones, where that is so.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str
    changes: dict[Line, JsonValue] = {}
    config: RunConfig
    published: tuple[Published, ...]
    incomparable: Line | None = None
    runs: list[Run] = Field(min_length=1)

    @field_serializer("published")
    def _by_name(self, published: tuple[Published, ...]) -> list[dict[str, JsonValue]]:
        return [each._asdict() for each in published]

    def percent(self, metric: str) -> list[float]:
        """A metric of every run, in percent."""
        return [100 * run.metrics[metric] for run in self.runs]


def read_reproduction(folder: Path) -> Reproduction:
    """The reproduction in a folder.

    Raises:
        ConfigError: There is none, or it is damaged.
    """
    file = folder / SUMMARY
    try:
        return Reproduction.model_validate_json(read_regular(file, _MOST))
    except OSError as error:
        raise ConfigError(f"no reproduction in {one_line(str(folder), 200)}: {SUMMARY}: {error.strerror}") from None
    except ValidationError as error:
        raise ConfigError(
            f"{one_line(str(file), 200)} is of another version or damaged: {one_line(explain(error), 300)}"
        ) from None


def command(preset: str, changes: Mapping[str, JsonValue] = {}, seeds: Sequence[int] = SEEDS) -> str:
    """The command that makes a reproduction, as it is typed."""
    settings = "".join(f" {shlex.quote(f'{path}={_typed(value)}')}" for path, value in changes.items())
    return f"inflora reproduce {preset}{settings} --seeds {','.join(map(str, seeds))}"


def _typed(value: JsonValue) -> str:
    """A value as YAML reads it on a command line."""
    return value if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value) else json.dumps(value)


# Pages.


def page(found: Reproduction) -> str:
    """The page of a reproduction, in Markdown that needs nothing else."""
    lines = [
        f"# {found.preset}",
        "",
        *results(found),
        *_how(command(found.preset, found.changes, [run.seed for run in found.runs]), found.config),
        *_seeds(found),
        *_matrix(found),
        "## What the numbers depend on",
        "",
        *table(["", ""], [list(fact) for fact in _facts(found)]),
        *_settings(found.config),
    ]
    return "\n".join(lines)


def plan(preset: str) -> str:
    """The page of a preset that nobody has run yet: what to type, and what is to be expected."""
    config, published = find_preset(preset)
    here = ["here", "**not run yet**", "", "", ""]
    lines = [f"# {preset}", "", *_results(here, published, len(SEEDS))]
    return "\n".join([*lines, *_how(command(preset), config), *_settings(config)])


def results(found: Reproduction) -> list[str]:
    """Its results beside the published ones, as Markdown."""
    ours = [f"here, seeds {', '.join(str(run.seed) for run in found.runs)}", *means(found), "", ""]
    compared = () if found.incomparable else found.published
    why = [f"Not held against published numbers: {found.incomparable}.", ""] if found.incomparable else []
    return [*_results(ours, compared, len(found.runs), fmean(found.percent("acc/final"))), *why]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown, and an empty line."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)] + [""]


def means(found: Reproduction) -> list[str]:
    """Final and average incremental accuracy over seeds."""
    return [shown_as(*spread(found.percent(metric))) for metric in ("acc/final", "acc/avg_incremental")]


def shown_as(mean: float, std: float | None) -> str:
    """Mean ± spread."""
    return f"{mean:.2f}" + ("" if std is None else f" ± {std:.2f}")


def _results(ours: list[str], published: Sequence[Published], runs: int, final: float | None = None) -> Iterator[str]:
    """The result, the published ones below it, and the meaning of what is expected."""
    yield "Percent, on test images; mean ± sample standard deviation over seeds."
    yield ""
    header = ["", "final", "average incremental", f"expected final, mean of {runs}", ""]
    yield from table(header, [ours, *(_as_published(each, runs, final) for each in published)])
    if any(each.spread is not None for each in published):
        yield "Expected: the published mean ± two standard errors of the difference of the two means, from the"
        yield "published spread over seeds. Other draws of the data, weights and versions are not in it."
        yield ""


def _as_published(published: Published, runs: int, final: float | None) -> list[str]:
    seeds = "" if published.seeds is None else f", {published.seeds} seeds"
    shown = [shown_as(published.final, published.spread), f"{published.avg_incremental:.2f}"]
    return [f"{published.source}{seeds}", *shown, *expected(published, runs, final)]


def expected(published: Published, runs: int, final: float | None) -> tuple[str, str]:
    """The expected range of the mean of so many runs, and where ``final`` lies."""
    found = expected_range(published, runs)
    if found is None:
        return "no spread is published", "" if final is None else f"{final - published.final:+.2f}"
    low, high = found
    said = "" if final is None else "below" if final < low else "above" if final > high else "within"
    return f"{low:.2f} to {high:.2f}", said


def _how(typed: str, config: RunConfig) -> Iterator[str]:
    dataset = config.data.dataset
    needs = DATASETS[dataset].needs if dataset in DATASETS else "its images"
    yield from ("## Do it again", "", "```bash")
    if needs is not None:
        yield f"inflora data prepare {dataset} --source PATH   # once; PATH: {needs}"
    yield from (typed, "```", "")


def _seeds(found: Reproduction) -> Iterator[str]:
    rows = [[str(run.seed), *(f"{100 * run.metrics[name]:.2f}" for name in SHOWN)] for run in found.runs]
    several = [["mean", *(shown_as(*spread(found.percent(name))) for name in SHOWN)]] if len(rows) > 1 else []
    yield from ("## Every seed", "", *table(["seed", *(f"`{name}`" for name in SHOWN)], rows + several))
    yield from (f"- `{name}`: {meaning}" for name, meaning in SHOWN.items())
    yield ""


def _matrix(found: Reproduction) -> Iterator[str]:
    """The mean of the seeds' accuracy matrices."""
    matrices = [run.accuracy_matrix for run in found.runs]
    tasks = min(map(len, matrices))
    rows = []
    for done in range(tasks):
        cells = [f"{100 * fmean(matrix[done][task] for matrix in matrices):.1f}" for task in range(done + 1)]
        rows.append([str(done + 1), *cells, *[""] * (tasks - done - 1)])
    yield from ("## Accuracy on each task, mean over seeds", "")
    yield from table(["after task", *(f"on {task + 1}" for task in range(tasks))], rows)


def _facts(found: Reproduction) -> Iterator[tuple[str, str]]:
    """What the numbers depend on; more than one value where the seeds differ."""
    for name, meaning in _FACTS.items():
        values = dict.fromkeys(run.identity.get(name, "unknown") for run in found.runs)
        yield meaning, "; ".join(map(_brief if name == "class_order" else str, values))
    yield "settings, of each seed", ", ".join(run.identity.get("config_hash", "unknown") for run in found.runs)


def _brief(order: str) -> str:
    """A class order that may have hundreds of classes: its hash and how it begins."""
    first = order.split(",")[:10]
    more = ", ..." if order.count(",") >= len(first) else ""
    return f"{hashlib.sha256(order.encode()).hexdigest()[:16]}: {', '.join(first)}{more}"


def _settings(config: RunConfig) -> Iterator[str]:
    """Those that are not at their defaults: a setting that comes later changes no page."""
    chosen = {"adapter": {"name": config.adapter.name}, "classifier": {"name": config.classifier.name}}
    usual = _flat(parse_config(chosen))
    yield from (
        "## Settings",
        "",
        f"`{config_hash(config)}`, with seed {config.seed}; the others are at their defaults.",
        "",
    )
    yield "```text"
    for path, value in _flat(config).items():
        if path.endswith(".name") or usual.get(path, ...) != value:
            yield f"{path}={json.dumps(value)}"
    yield from ("```", "")


def _flat(config: RunConfig) -> dict[str, JsonValue]:
    """Dotted path -> value of every setting."""
    found: dict[str, JsonValue] = {}

    def visit(settings: Mapping[str, JsonValue], prefix: str) -> None:
        for name, value in settings.items():
            if isinstance(value, dict) and value:
                visit(value, f"{prefix}{name}.")
            else:
                found[prefix + name] = value

    visit(config.model_dump(mode="json"), "")
    return found


def write(found: Reproduction, folder: Path) -> None:
    """Write a reproduction's numbers and its page."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / SUMMARY, (found.model_dump_json(indent=1) + "\n").encode())
    write_atomically(folder / PAGE, page(found).encode())
