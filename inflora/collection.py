"""Many reproductions side by side in a folder, and the one table of them."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from inflora.config import ConfigError, config_hash, override
from inflora.files import write_atomically
from inflora.presets import PRESETS, find_preset
from inflora.reproduction import (
    PAGE,
    SEEDS,
    SUMMARY,
    Reproduction,
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


def checked_reproduction(folder: Path) -> Reproduction:
    """The reproduction in a folder, which whoever has sent it may have edited.

    Raises:
        ConfigError: There is none, or what it says of its settings is not so.
    """
    found = read_reproduction(folder)
    preset = find_preset(found.preset)
    seeds = [run.seed for run in found.runs]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"{folder}: a seed stands there twice, got {seeds}")
    if found.incomparable is not None:
        return found
    if found.published != preset.published:
        raise ConfigError(f"{folder}: its published numbers are not those of {found.preset}")
    for run in found.runs:
        theirs, ours = (config_hash(override(config, {"seed": run.seed})) for config in (found.config, preset.config))
        if run.identity.get("config_hash") != ours or theirs != ours:
            raise ConfigError(f"{folder}: seed {run.seed} is said to be {found.preset}, and its settings are others")
    return found


def collect(folder: Path, given: Sequence[Path]) -> str:
    """Take reproductions into a folder, write every page in it anew from its numbers, and the table; the table.

    Raises:
        ConfigError: What is given is no reproduction of a preset, not of what it says, or would take a run's place.
    """
    found: dict[str, Reproduction] = {}
    for sent in given:
        each = checked_reproduction(sent)
        place = folder / each.preset
        before = found.get(each.preset) or (read_reproduction(place) if (place / SUMMARY).is_file() else None)
        if before and (lost := [run.seed for run in before.runs if run not in each.runs]):
            raise ConfigError(
                f"{sent} lacks runs of {each.preset} that are there already, of seeds {lost}; to have it in their "
                f"place, give no other and remove {place}"
            )
        found[each.preset] = each
    for preset, each in found.items():
        write(each, folder / preset)
    for name in PRESETS:
        if (folder / name / SUMMARY).is_file():
            write(read_reproduction(folder / name), folder / name)
        elif (folder / name / PAGE).is_file():
            write_atomically(folder / name / PAGE, plan(name).encode())
    told = overview(folder)
    write_atomically(folder / TABLE, told.encode())
    return told
