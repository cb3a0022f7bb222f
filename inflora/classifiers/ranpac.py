"""RanPAC: ridge regression on random features (McDonnell et al., NeurIPS 2023, arXiv 2307.02251).

Shapes: B batch, N images, C classes of all tasks so far, D width, M random features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from inflora import distributed
from inflora.classifiers.drift import drift_map
from inflora.classifiers.fitted import Fitted
from inflora.classifiers.statistics import one_hot
from inflora.config import RanPACSettings
from inflora.features import Features
from inflora.layout import Layout, Spec
from inflora.task_data import TaskData

_DECADES = range(-5, 5)
"""The ridges that are tried, as powers of ten of the Gram matrix's mean diagonal; in float32 it has no more digits."""
_HELD_OUT = 5
"""One in so many of a task's images judges the ridge; then all of them count."""


class RanPAC(Fitted[RanPACSettings]):
    """Answers ``relu(f P) W`` with ``W = (G + r 1)^-1 Q``, which is the ridge regression of one-hot labels.

    Keeps the random ``projection`` P (D x M), the Gram matrix ``gram`` G (M x M) and the class sums ``sums`` Q (M x C)
    of all images' random features, and the power of ten of the ``ridge``.
    """

    projection: Tensor
    gram: Tensor
    sums: Tensor
    ridge: Tensor
    weight: Tensor

    def __init__(self, settings: RanPACSettings, width: int) -> None:
        super().__init__(settings, width)
        self.register_buffer("projection", torch.zeros(width, 0))
        self.register_buffer("gram", torch.zeros(settings.features, settings.features))
        self.register_buffer("sums", torch.zeros(settings.features, 0))
        self.register_buffer("ridge", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(settings.features, 0), persistent=False)

    def begin_task(self, data: TaskData) -> None:
        super().begin_task(data)
        if not self.projection.numel():
            shape = self.width, self.settings.features
            drawn = torch.randn(shape, generator=data.draws.generator(0, "projection"))
            self.projection = drawn.to(data.input_format.device)

    def forward(self, features_BD: Tensor) -> Tensor:
        # All answers may be below zero, which a class without images would always have.
        logits_BC = nn.functional.relu(features_BD @ self.projection) @ self.weight
        return logits_BC.masked_fill(self.counts == 0, torch.finfo(logits_BC.dtype).min)

    def follow(self, before_ND: Tensor, after_ND: Tensor, ridge: float) -> None:
        """Let the projection follow in the place of what is remembered: ``(f W) (W^-1 P) = f P``."""
        map_DD = drift_map(before_ND, after_ND, ridge)
        self.projection = (torch.linalg.pinv(map_DD) @ self.projection.double()).float()

    def remember(self, seen: Features, count_C: Tensor, mean_CD: Tensor, data: TaskData) -> None:
        """Choose the ridge with the new task's held-out images, then add all of its images."""
        old = self.sums.shape[1]
        random_NM, held_N = self._random(seen.features_ND), seen.places_N % _HELD_OUT == _HELD_OUT - 1
        labels_N, classes = old + seen.labels_N, old + seen.classes
        fitting, held = (_products(random_NM[rows], labels_N[rows], classes) for rows in (~held_N, held_N))
        sums_MC = nn.functional.pad(self.sums.double(), (0, seen.classes))
        self.ridge.fill_(
            best_ridge(self.gram.double() + fitting[0], sums_MC + fitting[1], *held, start=int(self.ridge))
        )
        self.gram = (self.gram.double() + fitting[0] + held[0]).float()
        self.sums = (sums_MC + fitting[1] + held[1]).float()

    def solve(self) -> None:
        self.weight = ridge_weights(self.gram.double(), self.sums.double(), int(self.ridge)).float()

    def layout(self, sizes: Sequence[int]) -> Layout:
        features = self.settings.features
        return {
            **super().layout(sizes),
            "projection": Spec((self.width, features)),
            "gram": Spec((features, features)),
            "sums": Spec((features, sum(sizes))),
            "ridge": Spec(()),
        }

    def _random(self, features_ND: Tensor) -> Tensor:
        return nn.functional.relu(features_ND @ self.projection.double())


def _products(random_NM: Tensor, labels_N: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Gram matrix (M x M) and class sums (M x C) over all workers' images."""
    one_hot_NC = one_hot(labels_N, classes)
    return distributed.all_sum(random_NM.T @ random_NM), distributed.all_sum(random_NM.T @ one_hot_NC)


def ridge_weights(gram_MM: Tensor, sums_MC: Tensor, decade: int) -> Tensor:
    """``(G + r 1)^-1 Q`` (M x C) with ``r`` the ``decade``'s power of ten times the mean of G's diagonal."""
    diagonal = gram_MM.diagonal()
    ridge = (10.0**decade * diagonal.mean()).clamp_min(1e-30)
    return torch.cholesky_solve(sums_MC, torch.linalg.cholesky(gram_MM + torch.diag_embed(ridge.expand_as(diagonal))))


def best_ridge(gram_MM: Tensor, sums_MC: Tensor, held_gram_MM: Tensor, held_sums_MC: Tensor, start: int) -> int:
    """The decade with the least squared error on held-out images, sought from ``start`` down or up the hill.

    The error is ``|H W - Y|^2 = tr(W^T H^T H W) - 2 tr(W^T H^T Y)`` and a term without W: sums over images suffice.
    """

    def error(decade: int) -> float:
        weight_MC = ridge_weights(gram_MM, sums_MC, decade)
        return float(((held_gram_MM @ weight_MC - 2 * held_sums_MC) * weight_MC).sum())

    best, least = start, error(start)
    for step in (1, -1):
        while best + step in _DECADES and (tried := error(best + step)) < least:
            best, least = best + step, tried
    return best
