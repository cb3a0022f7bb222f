"""Cheaper looks at a setting: what a training with fewer epochs, images, tasks or blocks says of the full score.

A look is worth having as a rung of a search where its rank correlation with the truth is above .8 (and near to that of
a full look, which is noisy too).
"""

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pairs_report import table
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from table_file import Table, located, read_table, settings_of, trained
from table_replay import recording

import inflora
from inflora.config import RunConfig, override

Array = NDArray[np.float64]


def cheaper_looks(name: str, file: Path, drafts: Path, jobs: int) -> list[str]:
    """A table: for every look its share of a full training's steps, and its rank correlation with the truth."""
    recorded, _ = located(name, drafts / "data")
    recorded.prepare((drafts / "data").absolute())
    known = read_table(file)
    truth_S = recording(known).truth_S
    rows = [["a full one, one seed", "1", _correlation(_validation(known, known.tasks - 1), truth_S)]]
    for tasks in range(1, known.tasks):
        correlation = _correlation(_validation(known, tasks - 1), truth_S)
        rows.append([f"the first {tasks} of {known.tasks} tasks", f"{tasks / known.tasks:.2f}", correlation])
    for label, (share, changes) in _looks(name, drafts).items():
        scores_S = _scores(name, drafts, changes, jobs)
        rows.append([label, f"{share:.2f}", _correlation(scores_S, truth_S)])
    return [f"### {name}", "", *table(["look", "share of the training", "rank correlation with the truth"], rows)]


def _correlation(scores_S: Array, truth_S: Array) -> str:
    return f"{spearmanr(scores_S, truth_S).statistic:.2f}"


def _validation(known: Table, task: int) -> Array:
    """Every setting's accuracy on validation images after a task (from 0), with the first seed."""
    curves = [known.right["validation"][setting, 0] for setting in range(len(known.settings))]
    return np.array([0.0 if curve is None else curve[task].mean() for curve in curves])


def _looks(name: str, drafts: Path) -> dict[str, tuple[float, dict[str, Any]]]:
    _, base = located(name, drafts / "data")
    held_out = base.data.validation
    return {
        "one epoch": (1 / base.optim.epochs, {"optim.epochs": 1}),
        "half of the images": (0.5, {"data.validation": (1 + held_out) / 2}),
        "the first three of five blocks": (0.6, _three_blocks(base, drafts)),
    }


def _three_blocks(base: RunConfig, drafts: Path) -> dict[str, Any]:
    """A smaller model: the shipped one without its last two blocks."""
    file = (drafts / "three_blocks.safetensors").absolute()
    if not file.exists():
        shipped = load_file(Path(inflora.__file__).parent / "weights" / "glyph_vit.safetensors")
        kept = {name: each for name, each in shipped.items() if not name.startswith(("blocks.3.", "blocks.4."))}
        save_file(kept, file)
    return {"backbone.weights": str(file), "backbone.options": {**base.backbone.options, "depth": 3}}


def _scores(name: str, drafts: Path, changes: dict[str, Any], jobs: int) -> Array:
    """Every setting's accuracy on its validation images after the last task of a cheaper training."""
    recorded, _ = located(name, drafts / "data")
    settings = settings_of(recorded.sweep("table").space)
    with ProcessPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        look = partial(_look, name, drafts.absolute() / "data", changes)
        return np.array(list(pool.map(look, settings, chunksize=4)))


def _look(name: str, root: Path, changes: dict[str, Any], settings: dict[str, Any]) -> float:
    _, base = located(name, root)
    try:
        return float(trained(override(base, changes), settings, 0).validation[-1].mean())
    except FloatingPointError:
        return 0.0
