"""Pictures of what is believed of a sweep's score: along each setting, over pairs of them, and which of them matter.

Surfaces that the score could be are drawn from its posterior: the spread of whatever is worked out from them, a curve
or a share, is then its doubt. Shapes: F surfaces drawn, M points, G places along a setting, B settings of the others.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from threadpoolctl import threadpool_limits

from sweeps.engine.show.scales import place, places, ticks
from sweeps.engine.space.cube import encoded, settings_at
from sweeps.engine.space.domains import Choice, Scalar, Space
from sweeps.engine.space.estimate import Estimate, Estimates
from sweeps.engine.space.gaussian_process import Array, Posterior, spread_points

_DRAWN, _BETWEEN = 200, (2.5, 97.5)
_PLACES, _PLACES_OF_PAIRS, _OTHERS = 15, 13, 24
MOST_IN_PAIRS = 4
"""Settings whose pairs are drawn: those that matter most."""
COLORS = "Viridis"
_HEIGHT = 300
_INK = "#4c78a8"


class Curve(NamedTuple):
    """The score along one setting, averaged over the others, and the share of its variance that this alone explains."""

    places_G: Array
    mean_G: Array
    low_G: Array
    high_G: Array
    share: Estimate


def draw_surfaces(known: Posterior, points_MD: Array, count: int = _DRAWN) -> Array:
    """Surfaces that the score could be (F x M), drawn from its posterior; the same ones every time."""
    rng = np.random.default_rng(0)
    several = rng.multinomial(count, known.weight_K)
    surfaces = []
    for draw in np.flatnonzero(several):
        alone = slice(draw, draw + 1)
        one = Posterior(known.looks_ND, np.ones(1), *(part[alone] for part in known[2:]))
        mean_M, _ = one.at(points_MD)
        cov_MM = one.covariance(points_MD, points_MD)
        # Neighbours are all but equal: rounding would make the matrix indefinite.
        root_MM = np.linalg.cholesky(cov_MM + 1e-6 * cov_MM.diagonal().max() * np.eye(len(mean_M)))
        surfaces.append(mean_M + rng.standard_normal((several[draw], len(mean_M))) @ root_MM.T)
    return np.concatenate(surfaces)


def curves(known: Estimates) -> dict[str, Curve]:
    """The score along every setting."""
    with threadpool_limits(1):
        return {path: _curve(known, path) for path in known.sweep.space}


def _curve(known: Estimates, path: str) -> Curve:
    space = known.sweep.space
    places_G = np.array(places(space[path], _PLACES))
    settings = _along(space, {path: places_G})
    surface_FGB = draw_surfaces(known.posterior, encoded(space, settings)).reshape(_DRAWN, len(places_G), -1)
    curve_FG = surface_FGB.mean(2)
    share_F = curve_FG.var(1) / np.maximum(surface_FGB.reshape(_DRAWN, -1).var(1), 1e-12)
    (low_G, high_G), (low, high) = np.percentile(curve_FG, _BETWEEN, axis=0), np.percentile(share_F, _BETWEEN)
    return Curve(places_G, curve_FG.mean(0), low_G, high_G, Estimate(float(share_F.mean()), float(low), float(high)))


def _along(space: Space, axes: Mapping[str, Array]) -> list[dict[str, Scalar]]:
    """Settings for every combination of places on the axes, each with the same others; none where they never meet."""
    column = {path: at for at, path in enumerate(space)}
    others = []
    for point in spread_points(40 * _OTHERS, len(space)):
        # Their conditions are met by some choices only: others beside which a setting exists are looked for.
        if axes.keys() <= settings_at(space, point).keys():
            others.append(point)
    grid = np.stack(np.meshgrid(*axes.values(), indexing="ij"), -1).reshape(-1, len(axes))
    settings = []
    for shares in grid:
        for point in others[:_OTHERS]:
            moved = point.copy()
            moved[[column[path] for path in axes]] = shares
            settings.append(settings_at(space, moved))
    return settings


def curve_figures(known: Estimates, told: Mapping[str, Curve]) -> Iterator[go.Figure]:
    """A picture of each setting's curve with its band, the trials' own scores behind it."""
    values = [100 * record.value for record in known.finished if record.value is not None]
    bounds = [100 * bound for curve in told.values() for bound in (curve.low_G.min(), curve.high_G.max())]
    low, high = min(*values, *bounds), max(*values, *bounds)
    between = {"yaxis_range": [low - 0.08 * (high - low), high + 0.1 * (high - low)]}
    for path, curve in told.items():
        figure = go.Figure(_band(known, path, curve), {"height": _HEIGHT, "showlegend": False, **between})
        figure.add_trace(_trials(known, [path]))
        yield _with_axes(figure, known.sweep.space, path).update_yaxes(title=f"{known.sweep.objective} (%)")


def _band(known: Estimates, path: str, curve: Curve) -> list[Any]:
    x, mean, low, high = ((scale * part).tolist() for scale, part in zip((1, 100, 100, 100), curve[:4], strict=True))
    if isinstance(known.sweep.space[path], Choice):
        above, below = np.subtract(high, mean), np.subtract(mean, low)
        bars = {"type": "data", "array": above.tolist(), "arrayminus": below.tolist(), "thickness": 2}
        dots = {"color": _INK, "size": 11}
        return [go.Scatter(x=x, y=mean, mode="markers", marker=dots, error_y=bars, hoverinfo="y")]
    edge = {"mode": "lines", "line_width": 0, "hoverinfo": "skip"}
    return [
        go.Scatter(x=x, y=low, **edge),
        go.Scatter(x=x, y=high, fill="tonexty", fillcolor="rgba(76,120,168,.25)", **edge),
        go.Scatter(x=x, y=mean, mode="lines", line={"color": _INK, "width": 3}, hoverinfo="y"),
    ]


def importance_figure(told: Mapping[str, Curve]) -> go.Figure:
    """The share of the score's variance that each setting explains alone (its first-order Sobol index)."""
    paths = by_importance(told)[::-1]
    shares = [told[path].share for path in paths]
    above = [100 * (share.high - share.mean) for share in shares]
    below = [100 * (share.mean - share.low) for share in shares]
    bars = {"type": "data", "array": above, "arrayminus": below, "color": "#888", "thickness": 2}
    values = [100 * share.mean for share in shares]
    figure = go.Figure(go.Bar(x=values, y=paths, orientation="h", error_x=bars, marker_color=_INK, hoverinfo="x"))
    figure.update_layout(height=90 + 36 * len(paths), xaxis_title="share of the variance (%)", xaxis_range=[0, 105])
    return figure.update_yaxes(automargin=True, ticklabelstandoff=6)


def by_importance(told: Mapping[str, Curve]) -> list[str]:
    """The settings, the one that matters most first."""
    return sorted(told, key=lambda path: -told[path].share.mean)


class Pairs(NamedTuple):
    """Pictures of pairs of settings, and the scores at both ends of the colours that they share, in percent."""

    figures: list[go.Figure]
    low: float
    high: float


def pair_figures(known: Estimates, paths: Sequence[str]) -> Pairs:
    """The score over every pair of settings, averaged over the others, with the trials where they lie."""
    space = known.sweep.space
    surfaces: dict[tuple[str, str], tuple[Array, Array, Array]] = {}
    for pair in combinations(paths, 2):
        axes = {path: np.array(places(space[path], _PLACES_OF_PAIRS)) for path in pair}
        if settings := _along(space, axes):
            with threadpool_limits(1):
                mean_M, _ = known.posterior.at(encoded(space, settings))
            mean_M[[not axes.keys() <= each.keys() for each in settings]] = np.nan  # such settings do not exist
            x_G, y_H = axes.values()
            surfaces[pair] = (x_G, y_H, 100 * mean_M.reshape(len(x_G), len(y_H), -1).mean(2).T)
    if not surfaces:
        return Pairs([], 0, 0)
    low = min(float(np.nanmin(mean_HG)) for *_, mean_HG in surfaces.values())
    high = max(float(np.nanmax(mean_HG)) for *_, mean_HG in surfaces.values())
    figures = []
    for (x_path, y_path), (x_G, y_H, mean_HG) in surfaces.items():
        colors = {"zmin": low, "zmax": high, "colorscale": COLORS, "showscale": False, "hovertemplate": "%{z:.1f} %"}
        at: dict[str, Any] = {
            "x": x_G.tolist(),
            "y": y_H.tolist(),
            "z": mean_HG.tolist(),
            "name": "",
        }
        if any(isinstance(space[path], Choice) for path in (x_path, y_path)):
            surface: Any = go.Heatmap(**at, **colors)
        else:
            lines = {"line_width": 0.5, "line_color": "rgba(255,255,255,.5)", "ncontours": 12}
            surface = go.Contour(**at, **colors, contours_coloring="heatmap", **lines)
        figure = go.Figure([surface, _trials(known, [x_path, y_path])], {"height": _HEIGHT, "showlegend": False})
        _with_axes(figure, space, x_path, y_path)
        figures.append(figure.update_xaxes(showgrid=False).update_yaxes(showgrid=False))
    return Pairs(figures, low, high)


def _trials(known: Estimates, paths: Sequence[str]) -> go.Scatter:
    """Finished trials where they lie, the setting to train as a star; along one setting at their own scores."""
    space, told, best = known.sweep.space, known.of_trials(), known.best()
    shown = [record for record in known.finished if all(path in record.settings for path in paths)]
    at = [[place(space[path], record.settings[path], record.number) for record in shown] for path in paths]
    scores = [100 * (record.value or 0.0) for record in shown]
    x, y = (at[0], scores) if len(at) == 1 else at
    marker = {
        "color": ["#ffb000" if record is best else "rgba(255,255,255,.85)" for record in shown],
        "size": [16 if record is best else 7 for record in shown],
        "symbol": ["star" if record is best else "circle" for record in shown],
        "line": {"color": "#333", "width": 1},
    }
    names = [
        f"trial {record.number}: observed {score:.1f} %, estimated {100 * told[record.number].mean:.1f} %"
        for record, score in zip(shown, scores, strict=True)
    ]
    return go.Scatter(x=x, y=y, mode="markers", marker=marker, hovertext=names, hoverinfo="text", cliponaxis=False)


def _with_axes(figure: go.Figure, space: Space, x_path: str, y_path: str | None = None) -> go.Figure:
    """The figure with the settings' values along its axes."""
    for path, update in ((x_path, figure.update_xaxes), (y_path, figure.update_yaxes)):
        if path is not None:
            named = ticks(space[path])
            axis = {"tickvals": list(named), "ticktext": list(named.values()), "range": [0, 1], "zeroline": False}
            update(title=path, automargin=True, ticklabelstandoff=4, **axis)
    return figure
