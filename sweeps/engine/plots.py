"""Static pictures of runs."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def accuracy_matrix(matrix: Sequence[Sequence[float]]) -> Figure:
    """The accuracy a[i][j] on each task (column) after each task (row), as a lower triangle of coloured cells."""
    tasks = len(matrix)
    side = 1.5 + 0.55 * tasks
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    padded = [[*row, *([float("nan")] * (tasks - len(row)))] for row in matrix]
    image = axes.imshow(padded, vmin=0, vmax=1, cmap="viridis")
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color="white" if value < 0.6 else "black")
    axes.set(xlabel="accuracy on task", ylabel="after learning task", title="Accuracy matrix (%)")
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
