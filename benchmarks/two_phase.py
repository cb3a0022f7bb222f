"""Two-phase between streams: settings that were found on one, used on the other (arXiv 2403.09066).

python benchmarks/two_phase.py           writes its part of docs/results.md; what is done is not done again

18 runs, ten minutes of one processor.

The settings are those that pairs.py has chosen for InfLoRA + lda on validation images of each stream. They are put into
the other stream's run by what ``sweeps final --on`` does, trained on all its training images with three seeds in its
first class order, and tested, beside the defaults and beside the settings that were found there.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from pairs import ORDERS, SEEDS, Training, settings_of, settings_tried
from pairs_report import Pair, Tuned, read_figures, write_section
from streams import prepare

from inflora.config import RunConfig, override
from inflora.runs import train_into
from sweeps.engine.after.final import FinalRun, plan
from sweeps.engine.after.transfer import Found, Transfer, transfer
from sweeps.engine.after.transferred import judge_transfer, lines_of, values_of

TITLE = "## Settings found on one stream, used on the other"
PAIR, BETWEEN = Pair("inflora", "lda"), ("digits", "woven")


def defaults(stream: str, root: Path) -> RunConfig:
    """The pair's run on a stream with the first settings that pairs.py tries: the defaults."""
    first = tuple(settings_tried(PAIR.adapter)[0].items())
    config = Training(stream, PAIR.adapter, first, ORDERS[0], SEEDS[0], "test", ()).config(root)
    return override(config, {"classifier": PAIR.classifier})


def found(stream: str, tuned: Tuned, root: Path) -> Found:
    """The settings of the pair that pairs.py has found on a stream."""
    of_classifier = {f"classifier.{name}": value for name, value in settings_of(tuned.classifier).items()}
    settings = {**tuned.changes, **of_classifier}
    return Found(stream, settings, override(defaults(stream, root), settings))


def train(run: FinalRun) -> None:
    """Train one run, unless it is done."""
    torch.set_num_threads(1)
    train_into(run.folder, run.config, run.evaluate_on, resume=True)


def section(planned: Transfer, runs: list[FinalRun]) -> list[str]:
    """What became of one stream's settings on the other."""
    there, here = planned.configs["default"].data, planned.found.config.data
    streams = f"{here.dataset}, {here.task_count} tasks, used on {there.dataset}, {there.task_count} tasks"
    return [f"### Found on {streams}", "", *lines_of(planned, judge_transfer(planned, values_of(runs))), ""]


def main() -> None:
    """Do what is not done yet, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("results/two-phase"), help="a folder for each training")
    parser.add_argument("--figures", type=Path, default=Path("benchmarks/pairs.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at a time")
    arguments = parser.parse_args()
    pairs, root = read_figures(arguments.figures), (arguments.folder / "data").absolute()
    for stream in BETWEEN:
        prepare(stream, root)
    known = {stream: found(stream, pairs[stream][PAIR], root) for stream in BETWEEN}
    first, second = BETWEEN
    planned = [
        transfer(known[here], there, defaults(there, root), known[there])
        for here, there in ((first, second), (second, first))
    ]
    runs = [plan(each.configs, SEEDS, arguments.folder / each.on) for each in planned]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for _ in pool.map(train, [run for several in runs for run in several]):
            pass
    lines = [
        TITLE,
        "",
        "Written by `python benchmarks/two_phase.py`: a two-phase evaluation between datasets (arXiv 2403.09066), by",
        f"what `sweeps final SWEEP --on CONFIG --beside SWEEP` does. {' + '.join(PAIR)} with the settings that the",
        "search of the tables above has chosen on validation images of one stream, put into the run on the other;",
        "beside them the defaults (its own) and what was found there. Three seeds in the first class order.",
        "",
        *(line for each, several in zip(planned, runs, strict=True) for line in section(each, several)),
    ]
    write_section(arguments.out, TITLE, "\n".join(lines))


if __name__ == "__main__":
    main()
