"""A sweep on one HTML page that needs nothing else: what was found, how, what failed and what it cost."""

import html
import re
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from itertools import cycle
from typing import Any

import optuna
import plotly.graph_objects as go
from plotly.colors import qualitative

from inflora.metrics import forgetting
from sweeps.engine.ledger.records import Outcome, TrialRecord
from sweeps.engine.ledger.study import pareto_front
from sweeps.engine.ledger.trials import read_records, validation_images
from sweeps.engine.show.decision import decision
from sweeps.engine.show.pieces import document, embed, short, small
from sweeps.engine.show.status import best_line, gain_line, outcome_word, study_lines
from sweeps.engine.show.surface import (
    MOST_IN_PAIRS,
    by_importance,
    curve_figures,
    curves,
    importance_figure,
    pair_figures,
)
from sweeps.engine.space.budget import gpu_hours_spent
from sweeps.engine.space.domains import is_conditional
from sweeps.engine.space.estimate import ENOUGH, Estimates, best_estimated_first, estimate, winner, winners
from sweeps.engine.space.objectives import Metric, direction
from sweeps.engine.space.spec import Sweep

_SHOWN = 6
"""Trials whose matrices and curves are drawn: the best."""
_ENOUGH = 10
"""Finished trials below which importances and contours are noise that looks like knowledge."""
_OUTCOME_COLORS = {
    Outcome.FINISHED: "#2a9d5c",
    Outcome.PRUNED: "#b8b8b8",
    Outcome.FAILED: "#d1495b",
    Outcome.RUNNING: "#4c78a8",
}
_MEMORY = {
    "size": "memory: directions taken",
    "kept": "memory: share of the task's energy in it",
    "overlap": "memory: share of the task's energy in it before",
}

_GPU = {
    "gpu/utilisation": "GPU: percent of each task's time in which the card worked",
    "gpu/memory_gb": "GPU: the most memory a task held (GB)",
}


def page(sweep: Sweep, study: optuna.Study, *, driven: bool = True) -> str:
    """The whole report as one HTML document, with plotly's script inside; ``driven``: its driver is alive."""
    records = read_records(study)
    known = estimate(sweep, records, validation_images(study))
    best = winners(records, known)[:_SHOWN]
    states = study_lines(sweep, study, records, known, driven=driven)
    on_cards = (best_line(sweep, records, known), gain_line(known))
    parts = [
        f"<h1>{html.escape(sweep.name)}</h1>",
        f"<div class='soft'>{html.escape(_setup(sweep))}</div>",
        *decision(sweep, records, known, [line for line in states if line not in on_cards]),
        "<p class='soft'>All accuracies are on validation images; the test set stays closed until final training.</p>",
        *_surface(known),
        "<h2>Trials</h2>",
        _trial_table(sweep, records, known, pareto_front(study) if sweep.tradeoffs else set(), driven=driven),
        "<h2>Pruned and failed trials</h2>",
        _endings(records),
        "<h2>Search</h2>",
        *_too_few(sweep, study),
        *(embed(figure) for figure in search_figures(sweep, study)),
        "<h2>Learning</h2>",
        *(embed(figure) for figure in learning_figures(records, best)),
        *_side_by_side(accuracy_matrices(best)),
        "<h2>Cost</h2>",
        *(embed(figure) for figure in cost_figures(sweep, records)),
    ]
    return document(sweep.name, parts)


def _surface(known: Estimates | None) -> Iterator[str]:
    """The score over the space, as all finished trials tell of it."""
    if known is None:
        return
    yield "<h2>The score over the space</h2>"
    if len(known.finished) < ENOUGH:
        yield f"<p>{ENOUGH} finished trials can tell of it; there are {len(known.finished)}.</p>"
        return
    told = curves(known)
    paths = by_importance(told)
    rare = " What exists only beside some choices is seen where it exists." if is_conditional(known.sweep.space) else ""
    yield f"<p class='soft'>From all finished trials. Dots are trials, the star is the setting to train.{rare}</p>"
    yield "<h3>What matters: the share of the score's variance that each setting explains alone</h3>"
    yield small([importance_figure(told)], wide=True)
    yield "<h3>Along each setting, averaged over the others, with its 95 % band</h3>"
    yield small(curve_figures(known, {path: told[path] for path in paths}))
    pairs = pair_figures(known, paths[:MOST_IN_PAIRS])
    if pairs.figures:
        some = f", of the {MOST_IN_PAIRS} settings that matter most" if len(paths) > MOST_IN_PAIRS else ""
        yield f"<h3>Over pairs of settings, averaged over the others{some}</h3>"
        yield f"<div class='scale'>{pairs.low:.1f} %<i></i>{pairs.high:.1f} %</div>"
        yield small(pairs.figures)


def search_figures(sweep: Sweep, study: optuna.Study) -> Iterator[go.Figure]:
    """Plots of the search for every objective: its history, where good settings lie, which of them matter."""
    finished = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    if not finished:
        return
    show = optuna.visualization
    if sweep.tradeoffs and len(sweep.objectives) <= 3:
        yield show.plot_pareto_front(study, target_names=list(sweep.objectives))
    for index, objective in enumerate(sweep.objectives):
        told: dict[str, Any] = {"target_name": objective}
        if sweep.tradeoffs:
            told["target"] = _nth(index)
        history = show.plot_optimization_history(study, **told)
        yield history.update_layout(title="Scores as they were observed")
        yield show.plot_parallel_coordinate(study, **told).update_layout(title="Trials through the space")
        if sweep.tradeoffs:
            yield from _of_tradeoffs(study, index, objective, len(finished))


def _of_tradeoffs(study: optuna.Study, index: int, objective: Metric, finished: int) -> Iterator[go.Figure]:
    """Plots of one of several objectives: where good settings lie and which of them matter, which no estimate tells."""
    show, target = optuna.visualization, _nth(index)
    yield show.plot_slice(study, target=target, target_name=objective).update_layout(width=None)
    trials = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    names = sorted({name for trial in trials for name in trial.params})
    if finished >= _ENOUGH and len({trial.values[index] for trial in trials}) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            # Optuna asks what makes a value low.
            figure = show.plot_param_importances(study, target_name=objective, target=_nth(index, direction(objective)))
        yield figure.update_layout(title=f"Importance of settings, from {finished} finished trials")
    if len(names) > 1 and finished >= _ENOUGH:
        figure = show.plot_contour(study, params=names[:4], target=target, target_name=objective)
        title = f"Contours, interpolated between {finished} finished trials"
        yield figure.update_layout(title=title, height=200 * min(4, len(names)))


def _too_few(sweep: Sweep, study: optuna.Study) -> Iterator[str]:
    """Say why some plots are missing."""
    count = len(study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE]))
    if sweep.tradeoffs and count < _ENOUGH:
        yield f"<p>Importances and contours need {_ENOUGH} finished trials to mean anything; there are {count}.</p>"


def _nth(index: int, better: str = "minimize") -> Callable[[Any], float]:
    sign = 1 if better == "minimize" else -1
    return lambda trial: sign * trial.values[index]


def learning_figures(records: Sequence[TrialRecord], best: Sequence[TrialRecord]) -> Iterator[go.Figure]:
    """Accuracy after every task of all trials, those behind the best in grey; the best's forgetting and memory."""
    others = [record for record in records if record.reports and record not in best]
    if told := [*others, *best]:
        seen = {_name(record): [100 * report.metrics["acc/seen"] for report in record.reports] for record in told}
        yield _curves("accuracy on all classes seen (%)", seen, grey={_name(record) for record in others})
    if not best:
        return
    if len(best[0].reports) > 1:
        matrices = {_name(record): [report.accuracies for report in record.reports] for record in best}
        curves = {name: [100 * forgetting(m[:i]) for i in range(1, len(m) + 1)] for name, m in matrices.items()}
        yield _curves("forgetting so far (points)", curves)
    for kind, title in _MEMORY.items():
        names = [name for name in best[0].reports[-1].metrics if re.fullmatch(rf"memory/.+/{kind}", name)]
        layers = {name.split("/")[1]: [report.metrics.get(name) for report in best[0].reports] for name in names}
        if layers:
            yield _curves(f"{title}, {_name(best[0])}", layers)


def accuracy_matrices(best: Sequence[TrialRecord]) -> Iterator[go.Figure]:
    """Of the best trials."""
    for record in best:
        yield accuracy_matrix(f"{_name(record)}: accuracy (%)", [report.accuracies for report in record.reports])


def accuracy_matrix(title: str, matrix: Sequence[Sequence[float]]) -> go.Figure:
    """``a[i][j]`` in percent, rows from the first task down."""
    tasks = [str(index + 1) for index in range(len(matrix))]
    cells = [[100 * value for value in row] for row in matrix]
    heat = go.Heatmap(z=cells, x=tasks, y=tasks, zmin=0, zmax=100, colorscale="Viridis", texttemplate="%{z:.0f}")
    layout = {"title": title, "xaxis_title": "on task", "yaxis_title": "after task", "yaxis_autorange": "reversed"}
    sides = {"height": 420, "width": 530, "xaxis_type": "category", "yaxis_type": "category"}
    return go.Figure(heat, {**layout, **sides, "xaxis_showgrid": False, "yaxis_showgrid": False})


def cost_figures(sweep: Sweep, records: Sequence[TrialRecord]) -> Iterator[go.Figure]:
    """Where the time went, trial by trial."""
    told = [record for record in records if record.reports]
    if not told:
        return
    bars = [
        go.Bar(
            name=str(outcome),
            marker_color=_OUTCOME_COLORS[outcome],
            x=[str(record.number) for record in told if record.outcome is outcome],
            y=[sum(report.seconds for report in record.reports) / 60 for record in told if record.outcome is outcome],
        )
        for outcome in Outcome
        if any(record.outcome is outcome for record in told)
    ]
    gpus = gpu_hours_spent(sweep, records)
    title = "Training time per trial" + (f"; {gpus:.2f} GPU-hours in all" if gpus else "")
    axes = {"xaxis_title": "trial", "yaxis_title": "minutes", "xaxis_type": "category"}
    order = [str(record.number) for record in told]
    yield go.Figure(bars, {"title": title, "barmode": "stack", "xaxis_categoryarray": order, **axes})
    for metric, title in _GPU.items():
        used = {_name(record): [report.metrics.get(metric) for report in record.reports] for record in told}
        known = {name: values for name, values in used.items() if any(value is not None for value in values)}
        if known:
            yield _curves(title, known)


def _curves(title: str, curves: dict[str, list[Any]], grey: Container[str] = ()) -> go.Figure:
    """A line per name over the tasks learnt; grey ones have no entry in the legend, only a word at their points."""
    colors = cycle(qualitative.Plotly)
    lines = []
    for name, values in curves.items():
        color, shown = ("rgba(128,128,128,.4)", False) if name in grey else (next(colors), True)
        tasks = list(range(1, len(values) + 1))
        lines.append(go.Scatter(name=name, x=tasks, y=values, mode="lines+markers", line_color=color, showlegend=shown))
    return go.Figure(lines, {"xaxis_title": "tasks learnt", "xaxis_dtick": 1, "title": title})


def _side_by_side(figures: Iterator[go.Figure]) -> Iterator[str]:
    yield "<div class='row'>"
    yield from (embed(figure) for figure in figures)
    yield "</div>"


def _name(record: TrialRecord) -> str:
    return f"trial {record.number}"


def _setup(sweep: Sweep) -> str:
    wanted = ", ".join(f"{direction(metric)} {metric}" for metric in sweep.objectives)
    bounds = "".join(f", {constraint.text}" for constraint in sweep.constraints)
    return (
        f"{wanted}{bounds}; protocol {sweep.protocol}; sampler {sweep.sampler}, early stopping {sweep.early_stopping}; "
        f"dataset {sweep.base.data.dataset}, study {sweep.study_name}"
    )


def _trial_table(
    sweep: Sweep, records: Sequence[TrialRecord], known: Estimates | None, front: set[int], *, driven: bool
) -> str:
    best, estimates = winner(records, known), known.of_trials() if known else {}
    estimated = ["estimate"] if known else []
    columns = ["trial", "outcome", "tasks", *sweep.space, *sweep.objectives, *estimated, "minutes"]
    rows = [f"<tr>{''.join(f'<th>{html.escape(column)}</th>' for column in columns)}</tr>"]
    for record in best_estimated_first(records, known):
        values = [record.settings.get(path, "") for path in sweep.space]
        objectives: list[Any] = [f"{value:.4f}" if abs(value) < 10 else value for value in record.values]
        objectives = objectives or [""] * len(sweep.objectives)
        objectives += [estimates.get(record.number, "") for _ in estimated]
        minutes = sum(report.seconds for report in record.reports) / 60
        marks = " *" if record.number in front else ""
        outcome = outcome_word(record.outcome, driven=driven)
        cells = [f"{record.number}{marks}", outcome, len(record.reports), *values, *objectives, f"{minutes:.2f}"]
        shown = (html.escape(short(cell)) for cell in cells)
        kind = " class='best'" if record is best else ""
        rows.append(f"<tr{kind}>{''.join(f'<td>{cell}</td>' for cell in shown)}</tr>")
    star = "<p>* on the Pareto front</p>" if front else ""
    return f"<div class='wide'><table>{''.join(rows)}</table></div>{star}"


def _endings(records: Sequence[TrialRecord]) -> str:
    rows = [
        f"<tr><td>{record.number}</td><td class='text'>{record.outcome}</td><td>{max(1, len(record.tries))}</td>"
        f"<td class='text'>{html.escape(record.reason)}</td></tr>"
        for record in records
        if record.outcome in (Outcome.PRUNED, Outcome.FAILED)
    ]
    head = "<tr><th>trial</th><th class='text'>outcome</th><th>tries</th><th class='text'>reason</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>" if rows else "<p>None.</p>"
