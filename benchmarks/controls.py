"""InfLoRA's best pair of a stream with one part taken away at a time: on what does its accuracy rest?

python benchmarks/controls.py           writes its part of docs/results.md; what is done is not done again

The settings are those that pairs.py has chosen, on validation images with the first class order and seed. Each control
is trained with every class order and seed and judged on validation images, by the same classifier: no test image is
looked at. Nothing is tuned again for a control.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from pairs import ORDERS, SEEDS, Training, done, frozen
from pairs_report import Pair, Tuned, interval, ranked, read_figures, spread, table, write_section
from streams import prepare

TITLE = "## What InfLoRA's accuracy on woven rests on"
STREAM = "woven"
NO_PROJECTION = {"adapter.energy": 0.01, "adapter.energy_end": 0.01}
NO_BALANCE = {"adapter.balance": None}
TENTH = {"adapter.merge": 0.1}
CONTROLS: dict[str, dict[str, Any]] = {
    "as chosen": {},
    "without the projection: the memory keeps a hundredth of the inputs' energy": NO_PROJECTION,
    "without the balance: updates are merged whole": NO_BALANCE,
    "without the balance: a tenth of later updates is merged": NO_BALANCE | TENTH,
    "without either": NO_PROJECTION | NO_BALANCE,
    "without either: a tenth of later updates is merged": NO_PROJECTION | NO_BALANCE | TENTH,
}


def of_control(pair: Pair, tuned: Tuned, without: dict[str, Any]) -> list[Training]:
    """The pair's trainings without a part: one for each class order and seed."""
    changes = frozen({**tuned.changes, **without})
    return [
        Training(STREAM, pair.adapter, changes, order, seed, "validation", (tuned.classifier,))
        for order in ORDERS
        for seed in SEEDS
    ]


def main() -> None:
    """Do what is not done yet, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("results/pairs"), help="a file for each training")
    parser.add_argument("--figures", type=Path, default=Path("benchmarks/pairs.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at a time")
    arguments = parser.parse_args()
    pairs = read_figures(arguments.figures)[STREAM]
    pair = next(pair for pair in ranked(pairs) if pair.adapter == "inflora")
    prepare(STREAM, arguments.folder / "data")
    trainings = {name: of_control(pair, pairs[pair], without) for name, without in CONTROLS.items()}
    shown = done([each for several in trainings.values() for each in several], arguments.folder, arguments.jobs)
    label = pairs[pair].classifier
    percent = {name: [100 * shown[each][label]["acc/final"] for each in several] for name, several in trainings.items()}
    whole = percent["as chosen"]
    rows = []
    for name, values in percent.items():
        gap, half = interval([a - b for a, b in zip(values, whole, strict=True)])
        rows.append([name, spread(values), f"{gap:+.1f} ± {half:.1f}" if name != "as chosen" else ""])
    lines = [
        TITLE,
        "",
        f"Written by `python benchmarks/controls.py`: {' + '.join(pair)} with the settings of the table above, and",
        "with one part or two taken away, nothing being tuned again. Final accuracy on validation images, percent:",
        "mean ± sample standard deviation over three seeds in three class orders, and the paired difference with its",
        "95 % interval. With the projection off an update is free in all directions: plain LoRA whose A begins with",
        "the leading directions of the new task's inputs.",
        "",
        *table(["", "final", "difference"], rows),
    ]
    write_section(arguments.out, TITLE, "\n".join(lines))


if __name__ == "__main__":
    main()
