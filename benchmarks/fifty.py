"""Fifty tasks: what keeps its accuracy, against the same classifier on the features of all tasks learnt at once.

python benchmarks/fifty.py      writes its part of docs/results.md; what is done is not done again
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from pairs import SEEDS, Training, done, frozen
from pairs_report import spread, table, write_section
from streams import STREAMS, prepare

TITLE = "## Fifty tasks"
COMPARED, ORDER = ("letters", "many_strokes"), 1993
TENTH = {"optim.lr": 3e-3, "adapter.merge": 0.1, "adapter.first_merge": 1.0, "adapter.features": "both"}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "joint LoRA": ("joint", {"optim.lr": 3e-3}),
    "none": ("none", {"optim.lr": 1e-3}),
    "LoRA": ("lora", {"optim.lr": 1e-3}),
    "LoRA, a tenth merged": ("lora", TENTH),
    "InfLoRA, the paper's": ("inflora", {"optim.lr": 5e-4}),
    "InfLoRA, a tenth merged": ("inflora", TENTH | {"adapter.energy": 0.999}),
}
"""Adapters with settings of their own, from a few looks at the validation images of one seed."""
FITTED = {
    "linear": "linear",
    "aligned": "aligned temperature=0.1 steps=500 drift=0.01",
    "ncm": "ncm drift=0.01",
    "lda": "lda shrinkage=None drift=0.01",
    "qda": "qda pooling=0.9 drift=0.01",
    "ranpac": "ranpac features=1000 drift=0.01",
}
"""Classifiers with the settings that stand for them."""

Finals = Mapping[str, Mapping[str, list[float]]]
"""Of each row and classifier: the final accuracies of all seeds, in percent."""


def share(finals: Finals, row: str, name: str) -> float | None:
    """A row's accuracy as a share of what the same classifier has on joint features, None for those and without any."""
    joint = finals["joint LoRA"]
    return fmean(finals[row][name]) / fmean(joint[name]) if name in joint and row != "joint LoRA" else None


def report(streams: Mapping[str, Finals]) -> str:
    """The part of docs/results.md from its title on: accuracies, and their shares of the same classifier's on joint."""
    lines = [
        TITLE,
        "",
        "Written by `python benchmarks/fifty.py`: fifty tasks of two classes each, five epochs a task, three seeds.",
        "Final accuracy on test images in percent, mean ± sample standard deviation; in brackets as a share of what",
        "the same classifier has on the features of LoRA trained on all tasks at once. Settings are from a few looks",
        "at validation images; a tenth merged: all of the first task's update and a tenth of the others', features of",
        "both models.",
        "",
    ]
    for name, finals in streams.items():

        def cell(row: str, fitted: str, finals: Finals = finals) -> str:
            if fitted not in finals[row]:
                return ""
            part = share(finals, row, fitted)
            return spread(finals[row][fitted]) + (f" ({part:.2f})" if part else "")

        rows = [[row, *(cell(row, fitted) for fitted in FITTED)] for row in finals]
        lines += [f"### {name}", "", STREAMS[name].about, "", *table(["adapter", *FITTED], rows)]
    return "\n".join(lines)


def fitted_to(adapter: str) -> tuple[str, ...]:
    """The classifiers that are fitted to an adapter's features: alignment needs a second task."""
    return tuple(label for name, label in FITTED.items() if (adapter, name) != ("joint", "aligned"))


def measured(stream: str, folder: Path, jobs: int) -> Finals:
    """What all rows have on a stream."""
    prepare(stream, folder / "data")
    trainings = {
        (row, seed): Training(stream, adapter, frozen(changes), ORDER, seed, "test", fitted_to(adapter))
        for row, (adapter, changes) in ROWS.items()
        for seed in SEEDS
    }
    shown = done(list(trainings.values()), folder, jobs)
    return {
        row: {
            name: [100 * shown[trainings[row, seed]][label]["acc/final"] for seed in SEEDS]
            for name, label in FITTED.items()
            if label in shown[trainings[row, SEEDS[0]]]
        }
        for row in ROWS
    }


def main() -> None:
    """Do what is not done yet and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("results/pairs"), help="a file for each training")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at a time")
    arguments = parser.parse_args()
    streams = {stream: measured(stream, arguments.folder, arguments.jobs) for stream in COMPARED}
    write_section(arguments.out, TITLE, report(streams))


if __name__ == "__main__":
    main()
