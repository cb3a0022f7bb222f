"""The first screen of a sweep's report: the setting to train, how good it is, whether more trials are worth it."""

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from inflora.config import dump_config
from sweeps.engine.ledger.records import Outcome, TrialRecord
from sweeps.engine.show.pieces import paragraphs, short
from sweeps.engine.space.estimate import ENOUGH, NEXT, Estimate, Estimates, winner
from sweeps.engine.space.spec import Sweep

WORTH = 0.2
"""Points that a further batch of trials must promise to be worth it, where the sweep's own budget names no others."""


def decision(
    sweep: Sweep, records: Sequence[TrialRecord], known: Estimates | None, states: Sequence[str]
) -> Iterator[str]:
    """The cards of the first screen; ``states`` say how far the sweep is."""
    best = winner(records, known)
    if best is None:
        yield paragraphs(["No trial has finished.", *states])
        return
    yield "<div class='cards'>"
    yield _setting(sweep, best)
    yield _score(sweep, best, known)
    yield _card(
        "Are more trials worth it?", _more(sweep, records, known) + f"<div class='soft'>{paragraphs(states)}</div>"
    )
    yield "</div>"
    config = html.escape(dump_config(sweep.config(best.settings)))
    yield f"<details><summary>the whole configuration</summary><pre>{config}</pre></details>"


def _card(title: str, content: str) -> str:
    return f"<section class='card'><h2>{html.escape(title)}</h2>{content}</section>"


def _setting(sweep: Sweep, best: TrialRecord) -> str:
    first = sweep.first[0] if sweep.first else {}
    rows = ""
    for path, value in best.settings.items():
        before = f" <span class='soft'>(first {html.escape(short(first[path]))})</span>" if path in first else ""
        rows += f"<dt>{html.escape(path)}</dt><dd>{html.escape(short(value))}{before}</dd>"
    is_first = " It is the recipe's first setting." if _is(best.settings, sweep.first) else ""
    told = f"<p class='soft'>Trial {best.number}.{is_first} <code>sweeps export {html.escape(sweep.name)}</code></p>"
    return _card("Setting to train", f"<dl class='settings'>{rows}</dl>{told}")


def _is(settings: Mapping[str, Any], first: Sequence[Mapping[str, Any]]) -> bool:
    return bool(first) and dict(first[0]) == settings


def _score(sweep: Sweep, best: TrialRecord, known: Estimates | None) -> str:
    title = f"Its {sweep.objective}, on validation images"
    if known is None:
        return _card(title, f"<p class='big'>{100 * (best.value or 0.0):.1f} %</p><p class='soft'>as observed</p>")
    told = known.of_trials()
    own = told[best.number]
    parts = [
        f"<p><span class='big'>{100 * own.mean:.1f} %</span> estimated, 95 % between {100 * own.low:.1f} and "
        f"{100 * own.high:.1f}</p>"
    ]
    bars = [(f"trial {best.number}", own, best.value)]
    if sweep.first and not _is(best.settings, sweep.first):
        first = sweep.first[0]
        observed = next((record.value for record in known.finished if record.settings == dict(first)), None)
        bars.append(("the recipe's first", known.of(first), observed))
        parts.append(f"<p>{html.escape(_versus(known.difference(best.settings, first)))}</p>")
    return _card(title, "".join([parts[0], *_bars(bars), *parts[1:]]))


def _versus(difference: Estimate) -> str:
    points = 100 * difference.mean
    span = f"({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
    if difference.low <= 0:
        return f"{points:+.1f} points against the recipe's first setting {span}: it may be no better"
    return f"{points:+.1f} points against the recipe's first setting {span}"


def _bars(rows: Sequence[tuple[str, Estimate, float | None]]) -> Iterator[str]:
    """Estimates with their intervals on one scale, what was observed beside them as a ring."""
    values = [value for _, told, observed in rows for value in (*told, observed) if value is not None]
    low, high = min(values), max(values)
    low, high = low - 0.03 * (high - low), high + 0.03 * (high - low)

    def at(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.1f}%"

    yield "<div class='scores'>"
    for name, told, observed in rows:
        width = f"{100 * (told.high - told.low) / (high - low):.1f}%"
        ring = f"<u style='left:{at(observed)}'></u>" if observed is not None else ""
        seen = f", observed {100 * observed:.1f}" if observed is not None else ""
        bar = f"<i style='left:{at(told.low)};width:{width}'></i><b style='left:{at(told.mean)}'></b>{ring}"
        yield f"<span>{html.escape(name)}</span><span class='soft'>{100 * told.mean:.1f}{seen}</span>"
        yield f"<div class='track'>{bar}</div>"
    yield "</div>"


def _more(sweep: Sweep, records: Sequence[TrialRecord], known: Estimates | None) -> str:
    if known is None:
        return "<p>A search with tradeoffs ends where its front is good enough.</p>"
    if len(known.finished) < ENOUGH:
        return f"<p>{ENOUGH} finished trials can tell; there are {len(known.finished)}.</p>"
    points, least = 100 * known.expected_gain(), sweep.budget.until_gain or WORTH
    ended = [record for record in records if record.outcome is not Outcome.RUNNING]
    hours = NEXT * sum(report.seconds for record in ended for report in record.reports) / max(1, len(ended)) / 3600
    verdict = "Hardly." if points < least else "Yes."
    cost = f"{60 * hours:.0f} minutes" if hours < 2 else f"{hours:.1f} hours"
    lines = [f"The next {NEXT} trials are expected to add {points:.2f} points, for about {cost} of training."]
    lines += [f"Below {least:g} points (--until-gain) the search is over." if sweep.budget.until_gain else ""]
    return f"<p class='big'>{verdict}</p>" + paragraphs([line for line in lines if line])
