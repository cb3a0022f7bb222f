"""Tables of planted truth: does replaying searches on a table find the order that they truly have?"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau
from table_file import SOBOL, Table, settings_of
from table_replay import Arm, Recording, drawn, recording, replay
from table_streams import SPACE

from inflora.config import RunConfig
from sweeps.engine.space.cube import encoded

Array = NDArray[np.float64]
TASKS, IMAGES, SEEDS, SEED_NOISE = 5, 400, 3, 0.02


def planted(surface: int) -> tuple[Table, Array]:
    """A table as ``make`` would record it, and the planted accuracy of each of its settings after the last task.

    A surface has a broad top somewhere and a slope of its own in each direction; it spans about 20 points. An image is
    right where the setting's accuracy on that day is above the image's difficulty, give or take.
    """
    random = np.random.default_rng(surface)
    rows = settings_of(SPACE)[:SOBOL]
    points_SD = encoded(SPACE, rows)
    top_D, width_D = random.uniform(0.15, 0.85, 3), random.uniform(0.4, 1.2, 3)
    shape_S = np.exp(-(((points_SD - top_D) / width_D) ** 2).sum(1) * 2)
    truth_S = 0.55 + 0.2 * (shape_S - shape_S.min()) / np.ptp(shape_S)
    right: dict[str, dict[tuple[int, int], tuple[NDArray[np.bool_], ...] | None]] = {"validation": {}, "test": {}}
    for split in right:
        hard_I = random.permutation(np.linspace(0, 1, IMAGES))
        for setting, truth in enumerate(truth_S):
            for seed in range(SEEDS):
                accuracy = truth + random.normal(0, SEED_NOISE)
                curve = []
                for task in range(1, TASKS + 1):
                    seen = IMAGES // TASKS * task
                    start = accuracy + (1 - accuracy) * (1 - task / TASKS)
                    curve.append(hard_I[:seen] + random.normal(0, 0.15, seen) < start)
                right[split][setting, seed] = tuple(curve)
    images = [IMAGES // TASKS] * TASKS
    facts = {
        "base": RunConfig().model_dump(mode="json"),
        "space": {path: domain.model_dump(mode="json") for path, domain in SPACE.items()},
        "settings": rows,
        "images": {"validation": images, "test": images},
    }
    return Table(facts, right), truth_S  # type: ignore[arg-type]


def mean_regrets(known: Recording, arms: Mapping[str, Arm], replays: int, trials: int) -> Array:
    """Each way's mean regret in points, by the recording's truth."""
    budgets = [trials * known.tasks]
    return np.array(
        [
            100 * np.mean([replay(known, arm, drawn(known, number), budgets)[0].regret for number in range(replays)])
            for arm in arms.values()
        ]
    )


def agreement(arms: Mapping[str, Arm], surfaces: int, replays: int, trials: int = 16) -> dict[str, tuple[Array, float]]:
    """By each truth: the ways' mean regrets, and Kendall's tau of their order with that by the planted truth.

    "smoothed" is the truth that replays are judged by; "one look" takes each setting's first training for its truth.
    """
    kinds: dict[str, list[Array]] = {"planted": [], "smoothed": [], "one look": []}
    for surface in range(surfaces):
        table, truth_S = planted(surface)
        known = recording(table)
        truths = {"planted": truth_S, "smoothed": known.truth_S, "one look": known.right_TSKI[-1][:, 0].mean(1)}
        for kind, each in truths.items():
            single = kind == "one look"
            seen = known._replace(right_TSKI=[right[:, :1] for right in known.right_TSKI]) if single else known
            kinds[kind].append(mean_regrets(seen._replace(truth_S=np.asarray(each, float)), arms, replays, trials))
    means = {kind: np.mean(values, 0) for kind, values in kinds.items()}
    return {kind: (mean, float(kendalltau(mean, means["planted"]).statistic)) for kind, mean in means.items()}
