"""Before a winner is named: the best trials again, over seeds and class orders, against the recipe's first setting.

An estimate from one draw a trial still hangs on one seed and on one set of validation images. So the top trials are
trained again and judged on validation images, all over the same seeds and orders; each seed draws validation images of
its own, as the luck of one set would be in all means alike. The test set stays closed.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from inflora.config import ConfigError, RunConfig, dump_config, override
from inflora.files import write_atomically
from inflora.metrics import accuracy_matrix
from inflora.state import RunState, load_state
from sweeps.engine.after.export import read_trials
from sweeps.engine.after.final import FinalRun, FinalTraining
from sweeps.engine.ledger.reading import read_kept
from sweeps.engine.ledger.records import TrialRecord
from sweeps.engine.space.estimate import Estimates, winners
from sweeps.engine.space.spec import Sweep

FIRST = "first"
"""The label of the setting that the recipe tries first; what it is known from, a paper perhaps, the recipe says."""
_LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean over runs with its 95 % confidence interval (Student's t); no interval for one run."""

    mean: float
    low: float
    high: float
    runs: int


class Comparison(NamedTuple):
    """A paired comparison: the mean difference over the same seeds and orders, its interval, p and what that means."""

    difference: Estimate
    p: float
    verdict: str


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and confidence interval of what several runs gave."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Estimate(mean, -math.inf, math.inf, count)
    half = float(stats.t.ppf((1 + _LEVEL) / 2, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """A paired t test of ``ours`` against ``theirs``, run by run with the same seed and order.

    A difference whose interval holds 0 is called what it is: within seed noise.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    difference = estimate(differences)
    if len(differences) < 2:
        return Comparison(difference, 1.0, "one run each: nothing can be said")
    if len(set(differences)) == 1:  # no spread to divide by
        p = 1.0 if differences[0] == 0 else 0.0
    else:
        p = float(stats.ttest_rel(ours, theirs).pvalue)
    if difference.low <= 0 <= difference.high:
        return Comparison(difference, p, "within seed noise")
    return Comparison(difference, p, "better" if difference.mean > 0 else "worse")


def candidates(sweep: Sweep, records: Sequence[TrialRecord], known: Estimates | None, top: int) -> dict[str, RunConfig]:
    """The best trials, by estimate where there is one, and the recipe's first setting where the sweep has one.

    They have the names that the report gives them.

    Raises:
        ConfigError: No trial has finished.
    """
    best = winners(records, known)[:top]
    if not best:
        raise ConfigError(f"no trial of {sweep.name} has finished yet: {len(records)} started, none to judge")
    chosen = {f"trial-{record.number}": sweep.config(record.settings) for record in best}
    if sweep.first:
        first = sweep.config(sweep.first[0])
        chosen = {label: config for label, config in chosen.items() if config != first} | {FIRST: first}
    return chosen


def judged_orders(sweep: Sweep, orders: Sequence[int]) -> list[int | None]:
    """The class orders to judge on: those asked for, else the sweep's own unseen ones, else the one it learnt.

    Raises:
        ConfigError: A two-phase sweep would be judged on the order that its trials have learnt.
    """
    chosen: list[int | None] = list(orders or sweep.judge_orders) or [sweep.base.data.order_seed]
    if sweep.protocol == "two-phase" and sweep.base.data.order_seed in chosen:
        raise ConfigError(
            f"protocol two-phase judges on orders that no trial has learnt, got {sweep.base.data.order_seed}"
        )
    return chosen


def judge(runs: Sequence[FinalRun], objective: str) -> tuple[str, dict[str, Estimate], dict[str, Comparison]]:
    """The winner's label (highest mean), every candidate's estimate, and how it compares with the first setting."""
    values: dict[str, list[float]] = {}
    for run in runs:
        values.setdefault(run.label, []).append(score(load_state(run.folder / "state"), objective))
    estimates = {label: estimate(each) for label, each in values.items()}
    winner = max(estimates, key=lambda label: estimates[label].mean)
    others = [label for label in values if label != FIRST] if FIRST in values else []
    return winner, estimates, {label: compare(values[label], values[FIRST]) for label in others}


def score(state: RunState, objective: str) -> float:
    """A finished run's objective."""
    matrix = accuracy_matrix(state.evaluations)
    current = sum(row[-1] for row in matrix) / len(matrix)
    return {**state.metrics(state.tasks), "acc/current": current}[objective]


def judge_sweep(
    address: str, top: int, trained: FinalTraining, out: Path, say: Callable[[str], None]
) -> tuple[dict[str, RunConfig], FinalTraining]:
    """Choose the configs that the test set is opened for: a sweep's winner and the recipe's first setting."""
    sweep, study, _ = read_kept(address)
    records, known = read_trials(sweep, study)
    numbers = [order for order in trained.orders or [] if order is not None]
    trained = trained._replace(orders=judged_orders(sweep, numbers))
    judged = candidates(sweep, records, known, top)
    runs = trained.train(judged, out / "judged", "validation", say)
    winner, estimates, comparisons = judge(runs, sweep.objective)
    say(write_judgement(sweep, winner, estimates, comparisons, trained.orders or [], out))
    labels = [label for label in judged if label in (winner, FIRST)]
    chosen = {label: override(judged[label], {"data.train_on": "train+validation"}) for label in labels}
    write_atomically(out / "winner.yaml", dump_config(chosen[winner]).encode())
    return chosen, trained


def write_judgement(
    sweep: Sweep,
    winner: str,
    estimates: Mapping[str, Estimate],
    comparisons: Mapping[str, Comparison],
    orders: Sequence[int | None],
    folder: Path,
) -> str:
    """The judgement as Markdown (returned) and JSON in ``folder``."""
    lines = [f"# {sweep.name}: judged on validation images before the test set is opened", ""]
    lines += [
        f"| candidate | {sweep.objective}, mean | 95 % interval | against the recipe's first setting |",
        "|---|---|---|---|",
    ]
    for label, e in sorted(estimates.items(), key=lambda item: -item[1].mean):
        against = versus(comparisons[label]) if label in comparisons else ""
        lines.append(f"| {label} | {100 * e.mean:.1f} | {_interval(e)} | {against} |")
    named = ", ".join("natural" if order is None else str(order) for order in orders)
    runs = next(iter(estimates.values())).runs
    lines += ["", f"Percent; {runs} runs each, class orders: {named}; protocol {sweep.protocol}. Winner: **{winner}**."]
    lines += ["Each seed draws validation images of its own, the same for all candidates."]
    noise = [label for label, c in comparisons.items() if label == winner and c.verdict == "within seed noise"]
    lines += [f"{label} is ahead of the recipe's first setting by less than seed noise." for label in noise]
    text = "\n".join([*lines, ""])
    facts: dict[str, Any] = {
        "winner": winner,
        "protocol": sweep.protocol,
        "orders": list(orders),
        "estimates": {label: facts_of(e) for label, e in estimates.items()},
        "against_first": {
            label: {**c._asdict(), "difference": facts_of(c.difference)} for label, c in comparisons.items()
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "judged.md", text.encode())
    write_atomically(folder / "judged.json", json.dumps(facts, indent=2).encode())
    return text


def versus(comparison: Comparison) -> str:
    """A comparison in a table's cell: verdict, points with their interval, p."""
    d = comparison.difference
    said = f"{comparison.verdict}: {100 * d.mean:+.1f}"
    return said if d.runs < 2 else f"{said} ({100 * d.low:+.1f} to {100 * d.high:+.1f}), p = {comparison.p:.3f}"


def _interval(e: Estimate) -> str:
    return "none" if e.runs < 2 else f"{100 * e.low:.1f} to {100 * e.high:.1f}"


def facts_of(e: Estimate) -> dict[str, float | None]:
    """As JSON can hold it: no interval has no numbers."""
    return {name: value if math.isfinite(value) else None for name, value in e._asdict().items()}
