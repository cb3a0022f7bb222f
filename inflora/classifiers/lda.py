"""Linear discriminant analysis: classes are Gaussians of one covariance (Fisher, 1936).

Hayes and Kanan, "Deep SLDA" (CVPR workshops 2020, arXiv 1909.01520), keep it up over a stream as is done here.
Shapes: C classes, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from inflora.classifiers.drift import carried_covariances
from inflora.classifiers.fitted import LinearlyFitted
from inflora.classifiers.statistics import pooled_scatter
from inflora.config import LDASettings
from inflora.features import Features
from inflora.layout import Layout, Spec
from inflora.task_data import TaskData


class LDA(LinearlyFitted[LDASettings]):
    """Also keeps the scatter (D x D) of all images around the means of their classes."""

    scatter: Tensor

    def __init__(self, settings: LDASettings, width: int) -> None:
        super().__init__(settings, width)
        self.register_buffer("scatter", torch.zeros(width, width))

    def carry(self, map_DD: Tensor) -> None:
        super().carry(map_DD)
        self.scatter = carried_covariances(self.scatter.double(), map_DD).float()

    def remember(self, seen: Features, count_C: Tensor, mean_CD: Tensor, data: TaskData) -> None:
        super().remember(seen, count_C, mean_CD, data)
        scatter_DD = pooled_scatter(seen, mean_CD)
        self.scatter = self.scatter.to(scatter_DD.device) + scatter_DD.float()

    def solve(self) -> None:
        images = self.counts.double().sum()
        cov_DD = shrunk(self.scatter.double() / images, float(images), self.settings.shrinkage)
        weight_CD, bias_C = discriminant(self.means.double(), cov_DD, self.log_priors())
        self.weight, self.bias = weight_CD.float(), bias_C.float()

    def layout(self, sizes: Sequence[int]) -> Layout:
        return {**super().layout(sizes), "scatter": Spec((self.width, self.width))}


def discriminant(mean_CD: Tensor, cov_DD: Tensor, log_prior_C: Tensor) -> tuple[Tensor, Tensor]:
    """Weights ``S^-1 mu`` (C x D) and biases ``-mu S^-1 mu / 2 + log p`` (C): log posteriors up to a common term."""
    weight_CD = torch.cholesky_solve(mean_CD.T, cholesky(cov_DD)).T
    return weight_CD, log_prior_C - (weight_CD * mean_CD).sum(1) / 2


def shrunk(cov_DD: Tensor, images: float, shrinkage: float | None) -> Tensor:
    """``(1 - s) S + s t 1`` with ``t`` the mean variance; ``s`` None: by the oracle approximating formula.

    Chen et al., "Shrinkage algorithms for MMSE covariance estimation" (2010): the share that suits so many images of
    Gaussians, from the covariance alone.
    """
    variance = cov_DD.diagonal().mean()
    if shrinkage is None:
        energy, width = cov_DD.square().mean(), len(cov_DD)
        spread = (images + 1) * (energy - variance**2 / width)
        shrinkage = float(((energy + variance**2) / spread).clamp_max(1)) if spread > 0 else 1.0
    return (1 - shrinkage) * cov_DD + shrinkage * variance * torch.eye(len(cov_DD)).to(cov_DD)


def cholesky(cov: Tensor) -> Tensor:
    """Lower triangular roots of covariances (... x D x D), also where there were fewer images than dimensions."""
    ridge = (1e-12 * cov.diagonal(dim1=-2, dim2=-1).mean(-1)).clamp_min(1e-30)
    root, failed = torch.linalg.cholesky_ex(cov + ridge[..., None, None] * torch.eye(cov.shape[-1]).to(cov))
    if failed.any():
        # Rounding has made a direction without images negative: a thousandth of the mean variance is far above it.
        return torch.linalg.cholesky(cov + 1e9 * ridge[..., None, None] * torch.eye(cov.shape[-1]).to(cov))
    return root
