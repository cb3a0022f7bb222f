"""A small Gaussian process that expects noise: the posterior of a score over the unit cube, from noisy looks at it.

Few looks say little about length scales and noise, and fitted freely they run into their bounds. So nothing is fitted:
hyperparameters are drawn from priors, and every draw counts as much as it explains the looks (importance sampling). The
mean and the scale of the score have closed forms (Rasmussen and Williams, 2006, section 2.7; O'Hagan, 1978).

Shapes: N looks, M points asked for, D coordinates in [0, 1], K draws of hyperparameters.
"""

from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LENGTH, LENGTH_SPREAD = 0.7, 0.7
"""Length scales are log-normal: the median, and the standard deviation of the logarithm."""
NOISE, NOISE_SPREAD = -1.0, 1.2
"""The share of the looks' variance that is noise: its logit is normal, with this mean and standard deviation."""
SPREAD, SPREAD_LOOKS = 0.05, 2.0
"""A score's standard deviation over the space before any look, and for how many looks that knowledge counts."""
DRAWS = 64
KEPT = 8
"""The draws, of both rounds, that a prediction averages: those that explain the looks best."""
_JITTER = 1e-8


class Posterior(NamedTuple):
    """The score's posterior, a mixture over the draws kept; all in the units of the looks.

    ``noise_K`` are variances of a look. ``inverse_KNN``: of the looks' covariance at scale one, whose scale is
    ``scale_K``; ``residual_KN``: that times the looks' deviations from the ``level_K``.
    """

    looks_ND: Array
    weight_K: Array
    inverse_length_KD: Array
    signal_K: Array
    noise_K: Array
    scale_K: Array
    level_K: Array
    inverse_KNN: Array
    residual_KN: Array

    def at(self, points_MD: Array) -> tuple[Array, Array]:
        """Mean and standard deviation (M each) of the score, without a look's noise."""
        mean_KM, var_KM = self._of_draws(points_MD)
        mean_M = self.weight_K @ mean_KM
        return mean_M, np.sqrt(np.maximum(self.weight_K @ (var_KM + mean_KM**2) - mean_M**2, 0))

    def _of_draws(self, points_MD: Array) -> tuple[Array, Array]:
        covered_KMN = self.signal_K[:, None, None] * correlation(points_MD, self.looks_ND, self.inverse_length_KD)
        mean_KM = self.level_K[:, None] + (covered_KMN @ self.residual_KN[:, :, None])[..., 0]
        weighed_KMN = covered_KMN @ self.inverse_KNN
        ones_K = self.inverse_KNN.sum((1, 2))
        left_KM = self.signal_K[:, None] - (weighed_KMN * covered_KMN).sum(2)
        level_KM = (1 - weighed_KMN.sum(2)) ** 2 / ones_K[:, None]
        return mean_KM, self.scale_K[:, None] * np.maximum(left_KM + level_KM, 0)

    def covariance(self, points_MD: Array, others_LD: Array) -> Array:
        """Covariance (M x L) of the score at two sets of points, under the draw that explains the looks best."""
        best = slice(int(self.weight_K.argmax()), int(self.weight_K.argmax()) + 1)
        lengths, signal = self.inverse_length_KD[best], self.signal_K[best][0]
        one_MN, other_LN = (signal * correlation(p, self.looks_ND, lengths)[0] for p in (points_MD, others_LD))
        inverse_NN = self.inverse_KNN[best][0]
        left_ML = signal * correlation(points_MD, others_LD, lengths)[0] - one_MN @ inverse_NN @ other_LN.T
        one_M, other_L = (1 - (each @ inverse_NN).sum(1) for each in (one_MN, other_LN))
        return self.scale_K[best][0] * (left_ML + np.outer(one_M, other_L) / inverse_NN.sum())

    @property
    def noise(self) -> float:
        """Standard deviation of a look."""
        return float(np.sqrt(self.weight_K @ self.noise_K))


def correlation(points_MD: Array, others_ND: Array, inverse_length_KD: Array) -> Array:
    """Matern's with smoothness 5/2 (K x M x N)."""
    square_MND = (points_MD[:, None] - others_ND[None]) ** 2
    distance_KMN = np.sqrt(5 * np.einsum("mnd,kd->kmn", square_MND, inverse_length_KD**2))
    return (1 + distance_KMN + distance_KMN**2 / 3) * np.exp(-distance_KMN)


def posterior(looks_ND: Array, score_N: Array) -> Posterior:
    """What looks at a score, at least one, say of it everywhere."""
    width = looks_ND.shape[1]
    squares = float(((score_N - score_N.mean()) ** 2).sum()) + SPREAD_LOOKS * SPREAD**2
    spread = (squares / (len(score_N) - 1 + SPREAD_LOOKS)) ** 0.5
    standard_N = (score_N - score_N.mean()) / spread
    prior_KH = _normal_points(width + 1)
    first = _explained(looks_ND, standard_N, prior_KH)
    # Many looks leave only some draws of the prior likely: a second round is drawn where those are.
    weight_K = _weights(first.log_likelihood_K)
    centre_H = weight_K @ prior_KH
    spread_H = np.sqrt(np.maximum(weight_K @ (prior_KH - centre_H) ** 2, 0.2**2))
    second = _explained(looks_ND, standard_N, centre_H + spread_H * prior_KH)
    draws_KH = np.concatenate([prior_KH, centre_H + spread_H * prior_KH])
    log_prior_K = -(draws_KH**2).sum(1) / 2
    log_second_K = -(((draws_KH - centre_H) / spread_H) ** 2).sum(1) / 2 - np.log(spread_H).sum()
    both = _Explained(*(np.concatenate(parts) for parts in zip(first, second, strict=True)))
    log_weight_K = both.log_likelihood_K + log_prior_K - np.logaddexp(log_prior_K, log_second_K)
    kept = np.argsort(-log_weight_K, kind="stable")[:KEPT]
    chosen = _Explained(*(part[kept] for part in both))
    scale_K = spread**2 * chosen.scale_K
    return Posterior(
        looks_ND=looks_ND,
        weight_K=_weights(log_weight_K[kept]),
        inverse_length_KD=chosen.inverse_length_KD,
        signal_K=1 - chosen.noise_K,
        noise_K=scale_K * chosen.noise_K,
        scale_K=scale_K,
        level_K=score_N.mean() + spread * chosen.level_K,
        inverse_KNN=chosen.inverse_KNN,
        residual_KN=spread * chosen.residual_KN,
    )


class _Explained(NamedTuple):
    """Looks of mean 0 and variance about 1, explained with each of K draws; ``noise_K`` are shares of the scale."""

    log_likelihood_K: Array
    inverse_length_KD: Array
    noise_K: Array
    scale_K: Array
    level_K: Array
    inverse_KNN: Array
    residual_KN: Array


def _explained(looks_ND: Array, standard_N: Array, normal_KH: Array) -> _Explained:
    """The marginal likelihood of standardised looks with hyperparameters of standard normal draws (K x (D + 1))."""
    count, width = looks_ND.shape
    inverse_length_KD = np.exp(-LENGTH_SPREAD * normal_KH[:, :width]) / LENGTH
    noise_K = 1 / (1 + np.exp(-(NOISE + NOISE_SPREAD * normal_KH[:, width])))
    signal_K = 1 - noise_K
    cov_KNN = signal_K[:, None, None] * correlation(looks_ND, looks_ND, inverse_length_KD)
    cov_KNN += (noise_K + _JITTER)[:, None, None] * np.eye(count)
    log_det_K = 2 * np.log(np.diagonal(np.linalg.cholesky(cov_KNN), axis1=1, axis2=2)).sum(1)
    inverse_KNN = np.asarray(np.linalg.inv(cov_KNN), dtype=np.float64)
    ones_K, sums_K = inverse_KNN.sum((1, 2)), (inverse_KNN @ standard_N).sum(1)
    level_K = np.asarray(sums_K / ones_K, dtype=np.float64)
    residual_KN = (inverse_KNN @ (standard_N - level_K[:, None])[:, :, None])[..., 0]
    square_K = (residual_KN * (standard_N - level_K[:, None])).sum(1) + SPREAD_LOOKS
    freedom = count - 1 + SPREAD_LOOKS
    log_likelihood_K = -(log_det_K + np.log(ones_K) + freedom * np.log(square_K)) / 2
    scale_K = square_K / freedom
    return _Explained(log_likelihood_K, inverse_length_KD, noise_K, scale_K, level_K, inverse_KNN, residual_KN)


def _weights(log_weight_K: Array) -> Array:
    weight_K = np.exp(log_weight_K - log_weight_K.max())
    return weight_K / weight_K.sum()


@cache
def _normal_points(width: int) -> Array:
    """``DRAWS`` evenly spread draws (K x H) of as many independent standard normals."""
    shares_KH = spread_points(DRAWS, width)  # scipy, which has this for arrays, takes a tenth of a second to import
    return np.array([[NormalDist().inv_cdf(share) for share in shares_H] for shares_H in shares_KH])


def spread_points(count: int, width: int, start: float = 0.5) -> Array:
    """So many evenly spread points (M x D) in the unit cube; another ``start`` gives others.

    An additive recurrence with the powers of the root of ``x^(D + 1) = x + 1`` (Roberts, "The unreasonable
    effectiveness of quasirandom sequences", 2018): it needs no table, and any number of its points is spread evenly.
    """
    root = 2.0
    for _ in range(50):
        root = (1 + root) ** (1 / (width + 1))
    steps_D = root ** -np.arange(1.0, width + 1)
    points_MD = (start + np.arange(1, count + 1)[:, None] * steps_D) % 1
    return points_MD.clip(1e-6, 1 - 1e-6)
