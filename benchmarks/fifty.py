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
from streams import prepare

TITLE = "## Fifty tasks"
STREAM, ORDER = "many_strokes", 1993
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "joint LoRA": ("joint", {"optim.lr": 1e-3}),
    "none": ("none", {"optim.lr": 1e-3}),
    "LoRA": ("lora", {"optim.lr": 1e-3}),
    "InfLoRA, the paper's": ("inflora", {"optim.lr": 5e-4}),
    "InfLoRA, a tenth merged": ("inflora", {"optim.lr": 1e-3, "adapter.energy": 0.999, "adapter.merge": 0.1}),
}
"""Adapters with settings of their own; nothing is tuned."""
FITTED = {
    "linear": "linear",
    "aligned": "aligned temperature=0.1 steps=500 drift=0.01",
    "ncm": "ncm drift=0.01",
    "lda": "lda shrinkage=None drift=0.01",
    "qda": "qda pooling=0.9 drift=0.01",
    "ranpac": "ranpac features=1000 drift=0.01",
}
"""Classifiers with the settings that stand for them."""


def report(finals: Mapping[str, Mapping[str, list[float]]]) -> str:
    """The part of docs/results.md from its title on: accuracies, and their shares of the same classifier's on joint."""
    joint = finals["joint LoRA"]

    def cell(row: str, name: str) -> str:
        if name not in finals[row]:
            return ""
        share = fmean(finals[row][name]) / fmean(joint[name]) if name in joint and row != "joint LoRA" else None
        return spread(finals[row][name]) + (f" ({share:.2f})" if share else "")

    rows = [[row, *(cell(row, name) for name in FITTED)] for row in finals]
    return "\n".join(
        [
            TITLE,
            "",
            "Written by `python benchmarks/fifty.py`: fifty tasks of two generated classes each (20 training images a",
            "class), five epochs a task, nothing tuned, three seeds. Final accuracy on test images in percent, mean ±",
            "sample standard deviation; in brackets as a share of what the same classifier has on the features of LoRA",
            "trained on all tasks at once.",
            "",
            *table(["adapter", *FITTED], rows),
        ]
    )


def main() -> None:
    """Do what is not done yet and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("results/pairs"), help="a file for each training")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at a time")
    arguments = parser.parse_args()
    prepare(STREAM, arguments.folder / "data")
    trainings = {
        (row, seed): Training(STREAM, adapter, frozen(changes), ORDER, seed, "test")
        for row, (adapter, changes) in ROWS.items()
        for seed in SEEDS
    }
    shown = done(list(trainings.values()), arguments.folder, arguments.jobs)
    finals = {
        row: {
            name: [100 * shown[trainings[row, seed]][label]["acc/final"] for seed in SEEDS]
            for name, label in FITTED.items()
            if label in shown[trainings[row, SEEDS[0]]]
        }
        for row in ROWS
    }
    write_section(arguments.out, TITLE, report(finals))


if __name__ == "__main__":
    main()
