"""Static pictures of runs."""

from collections.abc import Mapping, Sequence

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def accuracy_matrix(matrix: Sequence[Sequence[float]]) -> Figure:
    """The accuracy a[i][j] on each task (column) after each task (row), as a lower triangle of coloured cells."""
    return _triangle(matrix, "Accuracy matrix (%)", "accuracy on task", highest=1.0)


def drift(metrics: Sequence[Mapping[str, float]]) -> Figure | None:
    """The drift of old tasks' features, ``drift/task<j>`` of each task's metrics; None without."""
    matrix = [[known[name] for j in range(i) if (name := f"drift/task{j}") in known] for i, known in enumerate(metrics)]
    if not any(matrix):
        return None
    highest = max(value for row in matrix for value in row)
    return _triangle(matrix, "Drift of features (% of their length)", "of task", highest=max(highest, 0.01))


def memory(metrics: Sequence[Mapping[str, float]]) -> Figure | None:
    """``memory/<layer>/...`` after every task, a line per layer; None for an adapter without a memory."""
    panels = {
        "size": "directions taken",
        "kept": "share of the task's energy in them",
        "overlap": "share of the task's energy in the old ones",
    }
    layers = [name.split("/")[1] for name in metrics[-1] if name.startswith("memory/") and name.endswith("/size")]
    if not layers:
        return None
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    every = figure.subplots(1, len(panels))
    shades = colormaps["viridis"].resampled(len(layers))
    for axes, (kind, ylabel) in zip(every, panels.items(), strict=True):
        for index, layer in enumerate(layers):
            values = [known[f"memory/{layer}/{kind}"] for known in metrics]
            axes.plot(range(1, len(values) + 1), values, marker=".", label=layer, color=shades(index))
        axes.set(xlabel="tasks learnt", ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def _triangle(matrix: Sequence[Sequence[float]], title: str, xlabel: str, *, highest: float) -> Figure:
    """Shares, a row after every task, as coloured cells with their percentage."""
    tasks = len(matrix)
    side = 1.5 + 0.55 * tasks
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    padded = [[*row, *([float("nan")] * (tasks - len(row)))] for row in matrix]
    image = axes.imshow(padded, vmin=0, vmax=highest, cmap="viridis")
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            color = "white" if value < 0.6 * highest else "black"
            axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color=color)
    axes.set(xlabel=xlabel, ylabel="after learning task", title=title)
    axes.set_xticks(range(tasks), [str(j + 1) for j in range(tasks)])
    axes.set_yticks(range(tasks), [str(i + 1) for i in range(tasks)])
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def accuracy_curves(curves: Mapping[str, Sequence[Sequence[float]]], ylabel: str) -> Figure:
    """A line per name over the tasks learnt; several curves of one name (seeds) give their mean and range."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, seeds in curves.items():
        tasks = range(1, len(seeds[0]) + 1)
        columns = [[100 * value for value in column] for column in zip(*seeds, strict=True)]
        (line,) = axes.plot(tasks, [sum(c) / len(c) for c in columns], marker="o", label=name)
        if len(seeds) > 1:
            axes.fill_between(
                tasks, [min(c) for c in columns], [max(c) for c in columns], color=line.get_color(), alpha=0.2
            )
    axes.set(xlabel="tasks learnt", ylabel=ylabel, ylim=(0, 101))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
