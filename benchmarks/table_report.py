"""What replays say: means with intervals, ratios between ways to search, the page and the picture made of them.

Shapes: R replays, B budgets. Regrets in points.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import process_time
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pairs_report import table
from table_replay import Point
from table_streams import SPACE

from sweeps.engine.space.acquisition import Looks, next_settings
from sweeps.engine.space.cube import settings_at
from sweeps.engine.space.gaussian_process import spread_points

Array = NDArray[np.float64]
_RESAMPLES = 4_000


class Regrets(NamedTuple):
    """A way to search on one table: true regrets, and how honest its claims are."""

    trials: tuple[int, ...]
    regret_RB: Array
    excess_RB: Array
    covered_RB: Array

    def at(self, trials: int) -> Array:
        """The regret of every replay (R) at the budget of so many trials."""
        return self.regret_RB[:, self.trials.index(trials)]


def regrets(trials: Sequence[int], replays: Sequence[Sequence[Point]]) -> Regrets:
    """The points of all replays of a way to search."""
    excess = [[0.0 if p.claimed is None else p.claimed.mean - p.truth for p in points] for points in replays]
    covered = [[p.claimed is None or p.claimed.low <= p.truth <= p.claimed.high for p in points] for points in replays]
    regret = [[p.regret for p in points] for points in replays]
    return Regrets(tuple(trials), 100 * np.array(regret), 100 * np.array(excess), np.array(covered, float))


class Interval(NamedTuple):
    """A figure and its 95 % interval."""

    middle: float
    low: float
    high: float


def ratio(ours: Sequence[Array], theirs: Sequence[Array]) -> Interval:
    """Mean regret of ours by that of theirs, all streams alike; replays of one number are resampled together.

    Each array holds a stream's replays (R), in the order of their numbers.
    """
    random = np.random.default_rng(0)
    tops, bottoms = np.zeros(_RESAMPLES), np.zeros(_RESAMPLES)
    for one, other in zip(ours, theirs, strict=True):
        chosen = random.integers(len(one), size=(_RESAMPLES, len(one)))
        tops, bottoms = tops + one[chosen].mean(1), bottoms + other[chosen].mean(1)
    middle = sum(one.mean() for one in ours) / max(sum(other.mean() for other in theirs), 1e-9)
    low, high = np.percentile(tops / np.maximum(bottoms, 1e-9), [2.5, 97.5])
    return Interval(float(middle), float(low), float(high))


def tasks_needed(reference: Regrets, wanted: float, tasks: int) -> float:
    """Tasks after which the mean regret of ``reference`` is at most ``wanted``; infinite where it never is."""
    means = reference.regret_RB.mean(0)
    for index, mean in enumerate(means):
        if mean <= wanted:
            if index == 0:
                return reference.trials[0] * tasks
            share = (means[index - 1] - wanted) / max(means[index - 1] - mean, 1e-9)
            return (reference.trials[index - 1] + share * np.diff(reference.trials)[index - 1]) * tasks
    return float("inf")


def spread_cell(found: Regrets, trials: int) -> str:
    """Mean regret at a budget with half of its 95 % interval, and the 90th percentile; empty where it was not asked."""
    if trials not in found.trials:
        return ""
    values = found.at(trials)
    half = 1.96 * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.2f} ± {half:.2f} ({np.percentile(values, 90):.1f})"


def shown(found: Mapping[str, Regrets], trials: Sequence[int], reference: Regrets, tasks: int) -> list[str]:
    """A row for each way to search: mean and 95 % interval, 90th percentile, and what random search needs for it."""
    rows = []
    for name, each in found.items():
        cells = [spread_cell(each, budget) for budget in trials]
        asked = trials[1] in each.trials
        needed = tasks_needed(reference, float(each.at(trials[1]).mean()), tasks) if asked else float("inf")
        rows.append([name, *cells, f"{needed:.0f}" if np.isfinite(needed) else f"over {reference.trials[-1] * tasks}"])
    header = ["search", *(f"{budget} trials" for budget in trials), f"random needs for that of {trials[1]}"]
    return table(header, rows)


def picture(found: Mapping[str, Mapping[str, Regrets]], path: Path) -> None:
    """Mean regret against trials' worth of tasks, a panel for each table."""
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(4 * columns, 2.9 * rows), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axes, (name, arms) in zip(panels, found.items(), strict=False):
        for label, each in arms.items():
            mean_B = each.regret_RB.mean(0)
            half_B = 1.96 * each.regret_RB.std(0, ddof=1) / len(each.regret_RB) ** 0.5
            (line,) = axes.plot(each.trials, mean_B, label=label, marker=".")
            axes.fill_between(each.trials, mean_B - half_B, mean_B + half_B, color=line.get_color(), alpha=0.15)
        axes.set(title=name, ylim=(0, None))
        axes.grid(alpha=0.3)
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    figure.supxlabel("tasks spent, in trials that learn all of them")
    figure.supylabel("true regret of the exported setting, points")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)


JUDGEMENT = "## Judged on six streams"


def judgement(found: Mapping[str, Mapping[str, Regrets]], tasks: Mapping[str, int], replays: int) -> str:
    """The part of docs/search.md from its title on; the last of the ways to search is the one that is judged."""
    *others, ours = next(iter(found.values()))
    lines = [
        JUDGEMENT,
        "",
        f"Written by `python benchmarks/tables.py judge --page docs/search.md`: {replays} replays of each way to",
        "search on each table. True regret of the exported setting at equal tasks, in points: mean ± half of its 95 %",
        "interval, and in brackets the 90th percentile.",
        "",
        *_by_stream(found, (*others, ours), 24),
        f"All streams alike, mean regret of {ours} by that of the others, with 95 % intervals (paired replays):",
        "",
        *_ratios(found, others, ours),
    ]
    random, budget = "random", 32
    wins = [each[ours].at(budget).mean() <= each[random].at(96).mean() for each in found.values()]
    ours_32, random_96 = (
        np.mean([each[name].at(trials).mean() for each in found.values()])
        for name, trials in ((ours, budget), (random, 96))
    )
    excess = np.mean([each[ours].excess_RB[:, each[ours].trials.index(24)].mean() for each in found.values()])
    covered = np.mean([each[ours].covered_RB[:, each[ours].trials.index(24)].mean() for each in found.values()])
    p90 = max(np.percentile(each[ours].at(24), 90) for each in found.values())
    worst = max(each[ours].at(24).mean() - each[random].at(24).mean() for each in found.values())
    lines += [
        f"- Random search of 96 trials, the luckiest exported: {random_96:.2f} points. {ours} with a third of those",
        f"  tasks: {ours_32:.2f}, on {sum(wins)} of {len(wins)} streams at most as much.",
        f"- Mean regret less random search's, on the worst stream: {worst:+.2f} points; largest 90th percentile:",
        f"  {p90:.1f}.",
        f"- The estimate of the exported setting's score less its truth: {excess:+.2f} points on average; its 95 %",
        f"  interval holds the truth in {100 * covered:.0f} % of the replays.",
        f"- A proposal takes {1000 * seconds_per_proposal(100):.0f} ms at 100 trials of three settings.",
        "",
        "![True regret against tasks spent](search-regret.png)",
    ]
    return "\n".join(lines)


def _by_stream(found: Mapping[str, Mapping[str, Regrets]], names: Sequence[str], trials: int) -> list[str]:
    rows = []
    for stream, arms in found.items():
        rows.append([stream, *(spread_cell(arms[name], trials) for name in names)])
    return table([f"{trials} trials", *names], rows)


def _ratios(found: Mapping[str, Mapping[str, Regrets]], others: Sequence[str], ours: str) -> list[str]:
    rows = []
    for trials in (12, 24, 48):
        cells = []
        for other in others:
            if any(trials not in arms[other].trials for arms in found.values()):
                cells.append("")
                continue
            each = ratio(*([arms[name].at(trials) for arms in found.values()] for name in (ours, other)))
            cells.append(f"{each.middle:.2f} ({each.low:.2f} to {each.high:.2f})")
        rows.append([str(trials), *cells])
    return table(["trials", *others], rows)


def seconds_per_proposal(trials: int) -> float:
    """Processor time of a proposal after so many finished trials, the median of nine."""
    random = np.random.default_rng(0)
    finished = [(settings_at(SPACE, point), float(random.normal(0.6, 0.03))) for point in spread_points(trials, 3)]
    took = []
    for seed in range(9):
        start = process_time()
        next_settings(SPACE, Looks(finished, number=trials, seed=seed))
        took.append(process_time() - start)
    return sorted(took)[4]
