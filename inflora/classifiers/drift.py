"""Drift compensation: what is remembered of old tasks' features follows the features when a task moves them.

SLDC (arXiv 2511.09926): the same images before and after a task show how features have moved; a linear map of the
former to the latter carries old means and covariances along. Shapes: N images, D width, C classes.
"""

import torch
from torch import Tensor

from inflora import distributed


def drift_map(before_ND: Tensor, after_ND: Tensor, ridge: float) -> Tensor:
    """W (D x D, float64) that minimises ``|after - before W|^2 + r |W - 1|^2``, over all workers' images.

    ``r`` is ``ridge`` times the mean energy of a feature's entry, summed over the images. Few images say little of most
    directions: what they do not show stays where it is, which a ridge around zero would shrink away.
    """
    gram_DD = distributed.all_sum(before_ND.T @ before_ND)
    moved_DD = distributed.all_sum(before_ND.T @ (after_ND - before_ND))
    identity_DD = torch.eye(len(gram_DD), dtype=gram_DD.dtype, device=gram_DD.device)
    root_DD, failed = torch.linalg.cholesky_ex(gram_DD + ridge * gram_DD.diagonal().mean() * identity_DD)
    if failed:  # features that are all zero, or too few of them for a ridge of zero
        return identity_DD
    return identity_DD + torch.cholesky_solve(moved_DD, root_DD)


def carried_covariances(cov: Tensor, map_DD: Tensor) -> Tensor:
    """``W^T S W`` of covariances or scatters (... x D x D): those of features ``f W`` (f a row)."""
    return map_DD.T @ cov @ map_DD
