"""Quadratic discriminant analysis: every class is a Gaussian of its own covariance, pulled towards the common one.

Friedman, "Regularized discriminant analysis" (JASA 1989). Shapes: B batch, C classes, D width, P = D (D + 1) / 2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from inflora.classifiers.drift import carried_covariances
from inflora.classifiers.fitted import Means
from inflora.classifiers.lda import cholesky, shrunk
from inflora.classifiers.statistics import class_covariances
from inflora.config import QDASettings
from inflora.features import Features
from inflora.layout import Layout, Spec
from inflora.task_data import TaskData


class QDA(Means[QDASettings]):
    """Also keeps every class's covariance, its lower triangle row by row: ``covariances`` (C x P)."""

    covariances: Tensor
    whitening: Tensor
    offset: Tensor

    def __init__(self, settings: QDASettings, width: int) -> None:
        super().__init__(settings, width)
        self.register_buffer("covariances", torch.zeros(0, width * (width + 1) // 2))
        self.register_buffer("whitening", torch.zeros(0, width, width), persistent=False)
        self.register_buffer("offset", torch.zeros(0), persistent=False)

    def carry(self, map_DD: Tensor) -> None:
        super().carry(map_DD)
        self.covariances = packed(carried_covariances(unpacked(self.covariances, self.width), map_DD))

    def remember(self, seen: Features, count_C: Tensor, mean_CD: Tensor, data: TaskData) -> None:
        super().remember(seen, count_C, mean_CD, data)
        own_CP = packed(class_covariances(seen, count_C, mean_CD))
        self.covariances = torch.cat([self.covariances.to(own_CP.device), own_CP])

    def solve(self) -> None:
        """The inverse root ``L^-1`` (C x D x D) of every covariance, and ``log p - log |L|`` (C)."""
        settings, images_C = self.settings, self.counts.double()
        own_CDD = unpacked(self.covariances, self.width)
        freedom_C = (images_C - 1).clamp_min(0)
        pooled_DD = torch.einsum("c,cde->de", freedom_C, own_CDD) / freedom_C.sum().clamp_min(1)
        whitening, offset = [], []
        # Class by class: all of them at once in float64 would be many times what is kept.
        for own_DD, log_prior in zip(own_CDD, self.log_priors(), strict=True):
            cov_DD = (1 - settings.pooling) * own_DD + settings.pooling * pooled_DD
            root_DD = cholesky(shrunk(cov_DD, float(images_C.sum()), settings.shrinkage))
            inverse_DD = torch.linalg.solve_triangular(root_DD, torch.eye(self.width).to(root_DD), upper=False)
            whitening.append(inverse_DD.float())
            offset.append((log_prior - root_DD.diagonal().log().sum()).float())
        self.whitening, self.offset = torch.stack(whitening), torch.stack(offset)

    def forward(self, features_BD: Tensor) -> Tensor:
        """Log posteriors (B x C) up to a common term: ``log p - log |L| - |L^-1 (f - mu)|^2 / 2``."""
        distances = [
            ((features_BD - mean_D) @ inverse_DD.T).square().sum(1)
            for mean_D, inverse_DD in zip(self.means, self.whitening, strict=True)
        ]
        # A class with one image may have no extent, so that all else is infinitely far: still nearer than one without.
        numbers = torch.finfo(self.offset.dtype)
        distance_BC = torch.stack(distances, dim=1).clamp_max(numbers.max / 8)
        return (self.offset - distance_BC / 2).clamp_min(numbers.min)

    def layout(self, sizes: Sequence[int]) -> Layout:
        triangle = self.width * (self.width + 1) // 2
        return {**super().layout(sizes), "covariances": Spec((sum(sizes), triangle))}


def packed(cov_CDD: Tensor) -> Tensor:
    """Lower triangles, row by row (C x P, float32)."""
    rows_P, columns_P = torch.tril_indices(*cov_CDD.shape[1:], device=cov_CDD.device)
    return cov_CDD[:, rows_P, columns_P].float()


def unpacked(triangle_CP: Tensor, width: int) -> Tensor:
    """The symmetric matrices (C x D x D, float64) of their lower triangles."""
    rows_P, columns_P = torch.tril_indices(width, width, device=triangle_CP.device)
    cov_CDD = triangle_CP.new_zeros(len(triangle_CP), width, width, dtype=torch.float64)
    cov_CDD[:, rows_P, columns_P] = cov_CDD[:, columns_P, rows_P] = triangle_CP.double()
    return cov_CDD
