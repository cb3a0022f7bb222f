"""What a report's page is built of: its style, which follows the reader's light or dark, figures, paragraphs."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2530; --soft: #5b6472; --paper: #fff; --card: #f5f7f9; --line: #d5dae1;
  --accent: #2f6db5; --best: #e0f2e4; --bar: #4c78a8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7ed; --soft: #a0a9b6; --paper: #15181d; --card: #1e232a;
  --line: #39414c; --accent: #8ab8f0; --best: #1d3b29; --bar: #7fa8d6; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 1.5em auto; padding: 0 1em; color: var(--ink);
  background: var(--paper); }
h1, h2, h3 { font-weight: 600; line-height: 1.25; } h1 { margin: 0; font-size: 1.7em; }
h2 { margin-top: 2em; border-bottom: 1px solid var(--line); } h3 { margin: 1.6em 0 .2em; font-size: 1.05em; }
p { max-width: 48em; } .soft { color: var(--soft); }
table { border-collapse: collapse; font-size: .93em; font-variant-numeric: tabular-nums; }
td, th { padding: .2em .6em; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid var(--soft); } tr:nth-child(even) { background: var(--card); }
tr.best { background: var(--best); } td.text, th.text { text-align: left; white-space: normal; }
pre { background: var(--card); padding: 1em; overflow-x: auto; } .wide { overflow-x: auto; }
summary { cursor: pointer; color: var(--soft); } .row { display: flex; flex-wrap: wrap; }
.cards { display: grid; gap: 1em; margin: 1em 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .9em 1.2em; }
.card h2 { margin: 0 0 .4em; border: 0; font-size: 1.05em; color: var(--soft); } .card p { margin: .5em 0; }
.card.wide { grid-column: 1 / -1; } .big { font-size: 2.1em; font-weight: 650; line-height: 1.2; }
.settings { display: grid; grid-template-columns: auto 1fr; gap: .1em 1em; margin: .5em 0; font-size: .95em; }
.settings dt { color: var(--soft); } .settings dd { margin: 0; font-variant-numeric: tabular-nums; font-weight: 600; }
.settings .soft { font-weight: 400; }
.scores { display: grid; grid-template-columns: 1fr max-content; gap: .1em 1em; align-items: center; margin: .8em 0; }
.track { position: relative; grid-column: 1 / -1; height: 1.5em; border-radius: 4px;
  background: linear-gradient(var(--line), var(--line)) center / 100% 1px no-repeat; }
.track i { position: absolute; top: 50%; translate: 0 -50%; height: .55em; border-radius: .3em; background: var(--bar);
  opacity: .45; } .track b, .track u { position: absolute; top: 50%; translate: -50% -50%; width: .8em; height: .8em;
  border-radius: 50%; background: var(--bar); } .track u { background: var(--card); border: 2px solid var(--ink);
  width: .45em; height: .45em; } .ends { display: flex; justify-content: space-between; font-size: .85em; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: .5em; }
.plots.one { grid-template-columns: minmax(0, 700px); } .plots > div { min-width: 0; }
.scale { display: flex; align-items: center; gap: .7em; margin: .5em 0; }
.scale i { width: 12em; height: .8em; border-radius: 3px;
  background: linear-gradient(to right, #440154, #482878, #3e4989, #31688e,
    #26828e, #1f9e89, #35b779, #6ece58, #b5de2b, #fde725); }
code { font-size: .95em; }
@media (max-width: 600px) { body { margin: .8em auto; font-size: 14.5px; } }
.js-plotly-plot :is(.infolayer, .cartesianlayer, .parcoords) text:not(.heatmap-label *) { fill: var(--ink) !important; }
.js-plotly-plot .gridlayer path, .js-plotly-plot .zerolinelayer path { stroke: var(--line) !important; }
.js-plotly-plot .legend .bg { fill: transparent !important; }
"""


def document(title: str, parts: Sequence[str]) -> str:
    """An HTML page that needs nothing else: its style and plotly's script are in it."""
    screen = "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    head = f"<meta charset='utf-8'>{screen}<title>{html.escape(title)}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}<script>{get_plotlyjs()}</script></head><body>{''.join(parts)}"


def embed(figure: go.Figure) -> str:
    """A figure as the page shows it; the page's own style colours its letters and lines."""
    clear = {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"}
    if figure.layout.margin.to_plotly_json() == {}:
        figure.update_layout(margin={"l": 60, "r": 25, "t": 60, "b": 50})
    if figure.layout.showlegend is not False:  # below the lines: on a telephone there is no room beside them
        figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.22, "yanchor": "top", "title": None})
    figure.update_layout(template="plotly_white", font_family="system-ui, sans-serif", **clear)
    figure.update_xaxes(exponentformat="none").update_yaxes(exponentformat="none")  # 0.0001, not 100µ
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True})


def small(figures: Iterable[go.Figure], *, wide: bool = False) -> str:
    """Several small figures, as many beside each other as there is room for; ``wide`` ones have a row of their own."""
    shown = []
    for figure in figures:
        figure.update_layout(margin={"l": 10, "r": 15, "t": 15, "b": 10})
        shown.append(f"<div>{embed(figure)}</div>")
    kind = "plots one" if wide else "plots"
    return f"<div class='{kind}'>{''.join(shown)}</div>"


def paragraphs(lines: Sequence[str]) -> str:
    """Lines of plain text."""
    return "<p>" + "<br>".join(html.escape(line) for line in lines) + "</p>"


def short(value: Any) -> str:
    """A number as a cell shows it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
