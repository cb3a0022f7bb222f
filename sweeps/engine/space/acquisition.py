"""Where to look next: the setting that could be the best (an upper confidence bound of the posterior).

Srinivas et al., "Gaussian process optimization in the bandit setting" (ICML 2010). Trials that still run are believed
to end as they are estimated (Ginsbourger et al., "Kriging is well-suited to parallelize optimization", 2010), so that
several at a time spread out.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from sweeps.engine.space.cube import encoded, point_of, settings_at
from sweeps.engine.space.domains import Scalar, Space
from sweeps.engine.space.gaussian_process import Array, Posterior, posterior, spread_points

BOLDNESS = 2.0
"""Standard deviations that an unknown setting is given the benefit of."""
FIRST_LOOKS = 5
"""Trials that are spread evenly over the space before any estimate guides them."""
_CANDIDATES, _NEAR = 256, 64
_IMAGINED = 256


class Looks(NamedTuple):
    """What a search knows: settings with their scores, those that still run, those that failed, and its seed.

    ``number`` counts all trials there have been, whatever became of them.
    """

    finished: Sequence[tuple[Mapping[str, Any], float]]
    running: Sequence[Mapping[str, Any]] = ()
    failed: Sequence[Mapping[str, Any]] = ()
    number: int = 0
    seed: int = 0


def next_settings(space: Space, looks: Looks) -> dict[str, Scalar]:
    """The settings to try next, a function of what is known."""
    start = _start(looks.seed)
    if len(looks.finished) < FIRST_LOOKS:
        return spread_settings(space, looks.number, looks.seed)
    several = candidates(space, [settings for settings, _ in looks.finished], start + looks.number * 0.618)
    with threadpool_limits(1):  # the matrices are small: threads of a busy machine would wait for each other
        return several[most_promising(space, looks, several)]


def spread_settings(space: Space, number: int, seed: int) -> dict[str, Scalar]:
    """The settings of trial ``number`` where nothing is known yet: all such trials lie evenly over the space."""
    return settings_at(space, spread_points(number + 1, len(space), _start(seed))[-1])


def _start(seed: int) -> float:
    return float(np.random.default_rng(seed).random())


def most_promising(space: Space, looks: Looks, several: Sequence[Mapping[str, Any]]) -> int:
    """The place among ``several`` settings of the one with the highest upper confidence bound.

    A setting that failed counts as one with the lowest score: it costs its tasks and gives nothing.
    """
    scores = [score for _, score in looks.finished]
    seen = [*(settings for settings, _ in looks.finished), *looks.failed]
    looks_ND, score_N = encoded(space, seen), np.array([*scores, *[min(scores)] * len(looks.failed)])
    known = posterior(looks_ND, score_N)
    if looks.running:
        running_RD = encoded(space, looks.running)
        known = posterior(np.concatenate([looks_ND, running_RD]), np.concatenate([score_N, known.at(running_RD)[0]]))
    mean_M, sd_M = known.at(encoded(space, several))
    return int((mean_M + BOLDNESS * sd_M).argmax())


def candidates(space: Space, tried: Sequence[Mapping[str, Any]], start: float) -> list[dict[str, Scalar]]:
    """Settings to choose from: spread over the whole space, and near those tried."""
    everywhere = spread_points(_CANDIDATES, len(space), start)
    origins = np.array([point_of(space, settings) for settings in tried])
    steps = (spread_points(_NEAR, len(space), start + 0.5) - 0.5) * 0.3
    near = (origins[np.arange(_NEAR) % len(origins)] + steps).clip(0, 1)
    return [settings_at(space, point) for point in np.concatenate([everywhere, near])]


def imagined_gain(space: Space, known: Posterior, tried_ND: Array, trials: int, most: float) -> float:
    """See ``Estimates.expected_gain``; ``known`` is the posterior, ``tried_ND`` the places of the finished trials.

    No score is above ``most``, which the posterior does not know.
    """
    several = [settings_at(space, point) for point in spread_points(_CANDIDATES, len(space))]
    points_MD = encoded(space, several)
    # The batch: where the bound is highest, each look taking away the doubt around it.
    mean_M, _ = known.at(points_MD)
    cov_MM, noise = known.covariance(points_MD, points_MD), known.noise**2
    batch: list[int] = []
    for _ in range(trials):
        batch.append(int((mean_M + BOLDNESS * np.sqrt(np.maximum(cov_MM.diagonal(), 0))).argmax()))
        look_M = cov_MM[:, batch[-1]].copy()
        cov_MM -= np.outer(look_M, look_M) / (look_M[batch[-1]] + noise)
    looked_BD = points_MD[batch]
    all_AD = np.concatenate([tried_ND, looked_BD])
    cov_BB = known.covariance(looked_BD, looked_BD) + noise * np.eye(trials)
    # Imagined results move all means by (C V^-1) times their surprise, which is normal with covariance V.
    root_BB = np.linalg.cholesky(cov_BB + 1e-12 * np.eye(trials))
    moves_AB = np.linalg.solve(root_BB, known.covariance(looked_BD, all_AD)).T
    surprise_IB = np.random.default_rng(0).standard_normal((_IMAGINED, trials))
    mean_A, _ = known.at(all_AD)
    after_IA = mean_A + np.concatenate([surprise_IB, -surprise_IB]) @ moves_AB.T
    now = min(float(known.at(tried_ND)[0].max()), most)
    return max(0.0, float(np.minimum(after_IA.max(1), most).mean()) - now)
