"""Many reproductions side by side in a folder, and the one table of them."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from inflora.files import write_atomically
from inflora.presets import PRESETS, find_preset
from inflora.reproduction import (
    PAGE,
    SEEDS,
    SUMMARY,
    expected,
    means,
    plan,
    read_reproduction,
    shown_as,
    table,
    write,
)

TABLE = "reproduced.md"


def overview(folder: Path) -> str:
    """The table of the reproductions in a folder, those that are planned among them."""
    rows = [
        _entry(name, folder / name)
        for name in PRESETS
        if any((folder / name / each).is_file() for each in (PAGE, SUMMARY))
    ]
    lines = [
        "# Reproduced",
        "",
        "Written by `inflora collect`: presets over seeds, each with its page and all numbers in a folder of its own.",
        "Percent, on test images; mean ± sample standard deviation over seeds. Nothing stands here that was not run.",
        "",
        *table(["preset", "seeds", "final", "average incremental", "published final", "expected", ""], rows),
        "To add one, run `inflora reproduce PRESET` where its data are and send its folder without `runs/`; then",
        "`inflora collect docs/results FOLDER`.",
    ]
    return "\n".join(lines) + "\n"


def _entry(name: str, folder: Path) -> list[str]:
    found = read_reproduction(folder) if (folder / SUMMARY).is_file() else None
    published, runs = PRESETS[name].published, len(SEEDS)
    result, final = ["", "not run yet", ""], None
    if found:
        published, runs = () if found.incomparable else found.published, len(found.runs)
        result, final = [str(runs), *means(found)], fmean(found.percent("acc/final"))
    against = max(published, key=lambda each: each.spread is not None, default=None)
    told = ["", "", ""]
    if against:
        told = [f"{shown_as(against.final, against.spread)}, {against.source}", *expected(against, runs, final)]
    return [f"[{name}]({name}/{PAGE})", *result, *told]


def collect(folder: Path, given: Sequence[Path]) -> str:
    """Take reproductions into a folder, write every page in it anew from its numbers, and the table; the table.

    Raises:
        ConfigError: What is given is no reproduction of a preset.
    """
    for each in map(read_reproduction, given):
        find_preset(each.preset)
        write(each, folder / each.preset)
    for name in PRESETS:
        if (folder / name / SUMMARY).is_file():
            write(read_reproduction(folder / name), folder / name)
        elif (folder / name / PAGE).is_file():
            write_atomically(folder / name / PAGE, plan(name).encode())
    told = overview(folder)
    write_atomically(folder / TABLE, told.encode())
    return told
