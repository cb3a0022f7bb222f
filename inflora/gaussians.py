"""Gaussians of classes' features, as they are remembered from task to task and drawn from.

Shapes: C classes, S features drawn for each of them, N = C S, D width, P = D (D + 1) / 2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_RIDGE = 1e-4
"""Added to a covariance's diagonal: with fewer images than dimensions it has no factor of its own."""


class Gaussians(NamedTuple):
    """Means (C x D) of a task's classes, zero for a class without images, and factors (C x P) of their covariances.

    A factor is the lower triangle, row by row, of L with ``L L^T`` the covariance and the ridge, in half precision.
    Rounding moves its numbers by 1/2048 of themselves at most, and ``L L^T`` stays positive whatever the rounding.
    """

    mean_CD: Tensor
    factor_CP: Tensor

    @classmethod
    def of(cls, mean_CD: Tensor, cov_CDD: Tensor) -> "Gaussians":
        """From means and covariances in float64.

        Raises:
            FloatingPointError: The features are too large for half precision.
        """
        width = cov_CDD.shape[1]
        ridge_DD = _RIDGE * torch.eye(width, dtype=cov_CDD.dtype, device=cov_CDD.device)
        root_CDD, failed_C = torch.linalg.cholesky_ex(cov_CDD + ridge_DD)
        # In float64 only features that half precision hardly reaches fail by their rounding.
        root_CDD[failed_C > 0] = torch.inf
        return cls(mean_CD.float(), _packed(root_CDD))

    def to(self, device: torch.device | str) -> "Gaussians":
        """The same on another device."""
        return Gaussians(self.mean_CD.to(device), self.factor_CP.to(device))

    def carried(self, map_DD: Tensor) -> "Gaussians":
        """The Gaussians of the features ``f W`` (f a row): means ``mu W``, and roots by a decomposition of ``W^T L``.

        Raises:
            FloatingPointError: The features are too large for half precision.
        """
        upper_CDD = torch.linalg.qr(self.roots().double().mT @ map_DD, mode="r").R
        # A zero on the diagonal, where the map takes a direction away, has no sign: its row stays.
        signs_CD = 1.0 - 2.0 * (upper_CDD.diagonal(dim1=-2, dim2=-1) < 0)
        return self._replace(
            mean_CD=(self.mean_CD.double() @ map_DD).float(), factor_CP=_packed((signs_CD[:, :, None] * upper_CDD).mT)
        )

    def has_images(self) -> Tensor:
        """True of the classes (C) that there is something to draw from."""
        return self.mean_CD.any(dim=1)

    def with_images(self) -> "Gaussians":
        """The Gaussians of the classes that have images."""
        return Gaussians(*(part[self.has_images()] for part in self))

    def roots(self) -> Tensor:
        """L (C x D x D, float32) of every class."""
        classes, width = self.mean_CD.shape
        place_D = torch.arange(width, device=self.factor_CP.device)
        in_factor_DD = (place_D * (place_D + 1) // 2)[:, None] + place_D
        root_CE = self.factor_CP.float().index_select(1, in_factor_DD.tril().flatten())
        return root_CE.view(classes, width, width).tril_()

    def covariances(self) -> Tensor:
        """The covariances (C x D x D, float32), without the ridge."""
        root_CDD = self.roots()
        return root_CDD @ root_CDD.mT - _RIDGE * torch.eye(root_CDD.shape[1], device=root_CDD.device)


def _packed(root_CDD: Tensor) -> Tensor:
    """The factors of roots L in float64."""
    width = root_CDD.shape[1]
    rows_P, columns_P = torch.tril_indices(width, width, device=root_CDD.device)
    factor_CP = root_CDD.flatten(1).index_select(1, rows_P * width + columns_P).half()
    if not factor_CP.isfinite().all():
        raise FloatingPointError(
            f"features with a deviation of {root_CDD.abs().amax():.3g} are too large to be remembered in half "
            "precision; try a smaller optim.lr"
        )
    return factor_CP


def sample(tasks: Sequence[Gaussians], samples: int, generator: torch.Generator) -> Tensor:
    """``samples`` features (N x D) of every class, class by class. Means of older tasks are shrunk more."""
    features = []
    for index, task in enumerate(tasks):
        shrink = 0.9 + 0.1 * (index + 1) / len(tasks)
        classes, width = task.mean_CD.shape
        noise_CSD = torch.randn(classes, samples, width, generator=generator, device=task.mean_CD.device)
        features.append((shrink * task.mean_CD[:, None] + noise_CSD @ task.roots().mT).flatten(0, 1))
    return torch.cat(features)
