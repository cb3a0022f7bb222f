"""Settings that were found elsewhere, as they did: beside a dataset's own, and beside those that were found there."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from inflora.files import write_atomically
from inflora.metrics import spread
from inflora.state import load_state
from sweeps.engine.after.final import FinalRun
from sweeps.engine.after.judge import Comparison, compare, facts_of, score, versus
from sweeps.engine.after.transfer import FOUND_THERE, THERE, Transfer
from sweeps.engine.ledger.records import describe

_METRIC = "acc/final"


class Judged(NamedTuple):
    """Final accuracies by label, one for each seed, and the paired comparisons of labels with each other."""

    values: dict[str, list[float]]
    against: dict[tuple[str, str], Comparison]

    @property
    def share(self) -> float | None:
        """The share of the gain found there that the transferred settings have too; None: no gain beyond seed noise."""
        gains = {ours: compared for (ours, theirs), compared in self.against.items() if theirs == THERE}
        most = gains.pop(FOUND_THERE, None)
        if most is None or most.verdict != "better":
            return None
        (transferred,) = gains.values()
        return transferred.difference.mean / most.difference.mean


def judge_transfer(planned: Transfer, values: Mapping[str, list[float]]) -> Judged:
    """Compare, seed by seed, what each label's runs have."""
    pairs = [(planned.label, THERE), (FOUND_THERE, THERE), (planned.label, FOUND_THERE)]
    known = [(ours, theirs) for ours, theirs in pairs if {ours, theirs} <= values.keys()]
    return Judged(dict(values), {(a, b): compare(values[a], values[b]) for a, b in known})


def values_of(runs: Sequence[FinalRun]) -> dict[str, list[float]]:
    """Label -> final accuracy of each of its finished runs."""
    values: dict[str, list[float]] = {}
    for run in runs:
        values.setdefault(run.label, []).append(score(load_state(run.folder / "state"), _METRIC))
    return values


def lines_of(planned: Transfer, judged: Judged) -> list[str]:
    """The judgement as Markdown."""
    seeds = len(judged.values[THERE])
    lines = [
        "| settings | final accuracy | against its own | against those found there |",
        "|---|---|---|---|",
    ]
    said = {THERE: "its own", planned.label: f"found on {planned.found.name}", FOUND_THERE: "found there"}
    for label, values in judged.values.items():
        mean, std = spread([100 * value for value in values])
        shown = f"{mean:.1f}" + ("" if std is None else f" ± {std:.1f}")
        versuses = [
            versus(judged.against[label, other]) if (label, other) in judged.against else ""
            for other in (THERE, FOUND_THERE)
        ]
        lines.append(f"| {said[label]} | {shown} | {' | '.join(versuses)} |")
    return [
        *lines,
        "",
        f"Percent, on test images; mean ± sample standard deviation of {seeds} runs, differences paired, with 95 %",
        "intervals (t).",
        *_share_line(planned, judged),
    ]


def _share_line(planned: Transfer, judged: Judged) -> list[str]:
    if planned.beside is None:
        return ["Nothing was searched there: which share of a gain transfers is not known (--beside SWEEP)."]
    if judged.share is None:
        return ["The settings found there are not better than its own beyond seed noise: there is no gain to share."]
    gain = judged.against[FOUND_THERE, THERE].difference.mean
    doubt = ", within seed noise of nothing" * (judged.against[planned.label, THERE].verdict == "within seed noise")
    return [f"Of the gain of the settings found there, {100 * gain:+.1f} points, {judged.share:.0%} transfers{doubt}."]


def write_transfer(planned: Transfer, judged: Judged, out: Path) -> str:
    """The judgement as Markdown (returned) and JSON in ``out``."""
    there, here = planned.configs[THERE].data, planned.found.config.data
    alike = there.task_count == here.task_count
    streams = f"Found on {here.dataset} in {here.task_count} tasks, judged on {there.dataset} in {there.task_count}"
    found = {f"on {planned.found.name}": planned.found}
    if planned.beside:
        found[f"there, by {planned.beside.name}"] = planned.beside
    text = "\n".join(
        [
            f"# Settings found on {planned.found.name}, on {planned.on}",
            "",
            *lines_of(planned, judged),
            "",
            f"{streams}." if alike else f"{streams}: other numbers of tasks than arXiv 2403.09066 would compare.",
            "",
            *(f"- found {where}: {describe(dict(each.settings))}" for where, each in found.items()),
            "",
        ]
    )
    facts = {
        "on": planned.on,
        "found_by": planned.found.name,
        "found_there_by": planned.beside.name if planned.beside else None,
        "final": judged.values,
        "against": {
            f"{a} - {b}": {**each._asdict(), "difference": facts_of(each.difference)}
            for (a, b), each in judged.against.items()
        },
        "share_of_gain": judged.share,
    }
    write_atomically(out / "transfer.md", text.encode())
    write_atomically(out / "transfer.json", json.dumps(facts, indent=2).encode())
    return text
