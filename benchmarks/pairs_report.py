"""The figures of benchmarks/pairs.py, kept in pairs.json, and the tables made of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from scipy.stats import t
from streams import STREAMS

from inflora.files import write_atomically

TITLE = "## Every adapter with every classifier"
ADAPTERS = ("joint", "none", "lora", "inflora", "olora", "sdlora", "e2lora", "l2p", "dualprompt", "codaprompt")
METRICS = {
    "acc/final": "final",
    "acc/avg_incremental": "average incremental",
    "forgetting": "forgetting",
    "acc/new_mean": "new task",
    "acc/task_aware": "task known",
}


class Pair(NamedTuple):
    """An adapter and a classifier, by name."""

    adapter: str
    classifier: str


class Tuned(NamedTuple):
    """A pair as it was chosen on validation images, and its tests: one for each class order and seed.

    A test has those of ``METRICS`` and ``share``: the classifier's seconds, with its passes over the images, as a share
    of those that the task's training takes.
    """

    changes: Mapping[str, Any]
    classifier: str
    validation: float
    tests: list[dict[str, float]]

    def percent(self, metric: str) -> list[float]:
        """A metric of every test, in percent."""
        return [100 * test[metric] for test in self.tests]


Pairs = Mapping[Pair, Tuned]


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{fmean(values):.1f} ± {stdev(values):.1f}"


def paired(ours: Tuned, others: Tuned) -> tuple[float, float]:
    """Mean difference of final accuracies in points, and half the width of its 95 % interval (paired t)."""
    return interval([a - b for a, b in zip(ours.percent("acc/final"), others.percent("acc/final"), strict=True)])


def interval(values: list[float]) -> tuple[float, float]:
    """The mean of values, and half the width of its 95 % interval (t)."""
    return fmean(values), float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def ranked(pairs: Pairs) -> list[Pair]:
    """The pairs, best final accuracy first."""
    return sorted(pairs, key=lambda pair: -fmean(pairs[pair].percent("acc/final")))


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown, and an empty line."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)] + [""]


def matrix(pairs: Pairs) -> list[str]:
    """Final accuracies: a row for each adapter, a column for each classifier."""
    classifiers_of: dict[str, list[str]] = {}
    for pair in pairs:
        classifiers_of.setdefault(pair.adapter, []).append(pair.classifier)
    adapters, classifiers = list(classifiers_of), max(classifiers_of.values(), key=len)

    def cell(pair: Pair) -> str:
        if pair not in pairs:
            return ""
        shown, frozen = spread(pairs[pair].percent("acc/final")), pairs.get(Pair("none", pair.classifier))
        if pair.adapter in ("none", "joint") or frozen is None:
            return shown
        gap, half = paired(pairs[pair], frozen)
        return f"{shown} {'▲' if gap > half else '▼' if gap < -half else ''}".rstrip()

    rows = [[adapter, *(cell(Pair(adapter, classifier)) for classifier in classifiers)] for adapter in adapters]
    return table(["adapter", *classifiers], rows)


def against_others(pairs: Pairs) -> list[str]:
    """The best pair with InfLoRA, and its lead over the best with every other adapter."""
    ranks = [pair for pair in ranked(pairs) if pair.adapter != "joint"]
    best = {pair.adapter: pair for pair in reversed(ranks)}
    if "inflora" not in best:
        return []
    ours = best.pop("inflora")
    rows = []
    for pair in sorted(best.values(), key=ranks.index):
        gap, half = paired(pairs[ours], pairs[pair])
        rows.append(
            [pair.adapter, pair.classifier, spread(pairs[pair].percent("acc/final")), f"{gap:+.1f} ± {half:.1f}"]
        )
    final = spread(pairs[ours].percent("acc/final"))
    lead = f"The best pair with InfLoRA, {' + '.join(ours)} ({final}), against the best with every other adapter:"
    return [lead, "", *table(["adapter", "its best classifier", "final", "InfLoRA's lead, 95 % interval"], rows)]


def details(pairs: Pairs) -> list[str]:
    """All metrics of every adapter's best pair, and the settings that were chosen."""
    best = {pair.adapter: pair for pair in reversed(ranked(pairs))}
    rows = []
    for pair in sorted(best.values(), key=ranked(pairs).index):
        tuned = pairs[pair]
        chosen = [f"{name}={brief(value)}" for name, value in tuned.changes.items()] + tuned.classifier.split(" ")[1:]
        share = fmean(tuned.percent("share"))
        metrics = (spread(tuned.percent(metric)) for metric in METRICS)
        rows.append([" + ".join(pair), *metrics, f"{share:.0f} %", " ".join(chosen)])
    return table(["pair", *METRICS.values(), "classifier's time", "settings"], rows)


def brief(value: Any) -> str:
    """A setting's value in few letters."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def report(streams: Mapping[str, Pairs]) -> str:
    """The part of docs/results.md from its title on."""
    lines = [
        TITLE,
        "",
        "Written by `python benchmarks/pairs.py`; every test and its settings go to `benchmarks/pairs.json`. The",
        "shipped glyph_vit, batches of 16, the same epochs for all. Every adapter is trained with twelve settings:",
        "its defaults, and draws that are the same for all adapters (learning rate, rank, merge, features,",
        "adapt_tasks, one or two of its own). Validation images (first class order, seed 0) choose two of the",
        "trainings: the best with `linear`, and the best with any classifier in closed form (`ncm`, `lda`, `qda`,",
        "`ranpac`). On the latter they choose the settings of every fitted classifier among the same four: with or",
        "without drift compensation (0.1), fitted to the plain images or to eight augmented looks at each besides",
        "(`views`). Then both are trained on all training images with three seeds in three class orders, and tested.",
        "Percent: mean ± sample standard deviation over the nine. ▲ ▼: above or below the frozen backbone (`none`)",
        "with the same classifier, beyond the 95 % interval of the paired differences (t, 8 degrees of freedom; the",
        "nine share their test images, and a classifier in closed form on plain images' frozen features is the same",
        "for all seeds). `joint`: plain LoRA on all tasks at once, the bound. `new task`: mean over tasks of the",
        "accuracy on a task just learnt, among all classes seen; `task known`: final accuracy when each image's task",
        "is known; `classifier's time`: its passes over the task's images and its solution, in percent of the time of",
        "a task's training, which is short where nothing is adapted or in the first task only.",
        "",
    ]
    for name, stream in STREAMS.items():
        if name not in streams:
            continue
        pairs = streams[name]
        lines += [f"### {name}, {stream.data.task_count} tasks", "", stream.about, *missing(pairs), ""]
        lines += [*matrix(pairs), *against_others(pairs), *details(pairs)]
    return "\n".join(lines).rstrip() + "\n"


def missing(pairs: Pairs) -> list[str]:
    """A line that names the adapters that have no figures, if there are any."""
    names = [f"`{name}`" for name in ADAPTERS if name not in {pair.adapter for pair in pairs}]
    return [f"Not measured yet: {', '.join(names)}."] if names else []


def read_figures(file: Path) -> dict[str, Pairs]:
    """What ``write_figures`` has written."""
    known = json.loads(file.read_text()) if file.exists() else {}
    return {
        stream: {Pair(*names.split(" + ")): Tuned(**tuned) for names, tuned in pairs.items()}
        for stream, pairs in known.items()
    }


def write_figures(known: Mapping[str, Pairs], file: Path) -> None:
    """Keep all that the report is made of, a line for each pair."""

    def line(names: Pair, tuned: Tuned) -> str:
        return f"  {json.dumps(' + '.join(names))}: {json.dumps(tuned._asdict())}"

    streams = [
        f" {json.dumps(stream)}: {{\n" + ",\n".join(line(*each) for each in pairs.items()) + "\n }"
        for stream, pairs in known.items()
    ]
    write_atomically(file, ("{\n" + ",\n".join(streams) + "\n}\n").encode())


def write_section(page: Path, title: str, section: str) -> None:
    """Put a section in the place of the one of that title, or at the end of the page, which may be new; others stay."""
    before, _, rest = (page.read_text() if page.exists() else "").partition(title)
    _, following, after = rest.partition("\n## ")
    text = f"{before.rstrip()}\n\n{section.rstrip()}\n{following}{after}"
    write_atomically(page, (text.strip() + "\n").encode())
