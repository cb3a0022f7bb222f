"""Classifier alignment: all classifiers trained together on features drawn from every class's Gaussian.

Zhang et al., "SLCA" (ICCV 2023, arXiv 2303.05118), as InfLoRA's authors combine it with theirs (InfLoRA + CA).
Shapes: C classes, S features drawn for each of them, D width, B batch.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from inflora import distributed
from inflora.config import AlignmentSettings
from inflora.data.loader import seeded
from inflora.data.order import drawn_features
from inflora.methods.base import TaskData
from inflora.methods.statistics import class_gaussians
from inflora.model import ContinualModel

_RIDGE = 1e-4

Drawn = tuple[Tensor, Tensor]
"""Features (B x D) and their classes (B), counted over all tasks in order of learning."""


class Alignment:
    """The Gaussians of all classes seen: for each task its means (C x D) and covariances (C x D x D)."""

    def __init__(self, settings: AlignmentSettings) -> None:
        self.settings = settings
        self.means: list[Tensor] = []
        self.covs: list[Tensor] = []

    def after_task(self, model: ContinualModel, data: TaskData) -> None:
        """Remember the task's classes; from the second task on, align all classifiers."""
        if not self.settings.epochs:
            return
        mean_CD, cov_CDD = class_gaussians(model, data)
        self.means.append(mean_CD.float().cpu())
        self.covs.append(cov_CDD.float().cpu())
        if len(self.means) > 1:
            align(model.heads, self._epochs(model, data), self.settings)

    def _epochs(self, model: ContinualModel, data: TaskData) -> Iterator[Iterator[Drawn]]:
        """Every epoch's batches, drawn or as they are given."""
        task, samples = data.task.index, self.settings.samples
        roots = self._roots() if data.draws is None else []
        for epoch in range(self.settings.epochs):
            if data.draws is None:
                yield self._draw(roots, seeded(data.seed, task, "alignment", epoch), model.device)
            else:
                given = drawn_features(data.draws, task, epoch, model.width, model.classes)
                yield zip(*(part.to(model.device).split(samples) for part in given), strict=True)

    def _roots(self) -> list[Tensor]:
        """For each task, of its classes with images (C): L (C x D x D) with ``L L^T`` the covariances and a ridge."""
        return [_root(cov_CDD[mean_CD.any(dim=1)]) for mean_CD, cov_CDD in zip(self.means, self.covs, strict=True)]

    def _draw(self, roots: Sequence[Tensor], generator: torch.Generator, device: torch.device) -> Iterator[Drawn]:
        """One epoch's features, shuffled: a batch of S per class with images. Means of older tasks are shrunk more."""
        features, seen = [], torch.cat(self.means).any(dim=1)
        for index, (mean_CD, root_CDD) in enumerate(zip(self.means, roots, strict=True)):
            mean_CD = mean_CD[mean_CD.any(dim=1)]
            shrink = 0.9 + 0.1 * (index + 1) / len(self.means)
            noise_CSD = torch.randn(len(mean_CD), self.settings.samples, mean_CD.shape[1], generator=generator)
            features.append((shrink * mean_CD[:, None] + noise_CSD @ root_CDD.mT).flatten(0, 1))
        drawn = torch.cat(features)
        order = torch.randperm(len(drawn), generator=generator)
        classes = seen.nonzero()[:, 0].repeat_interleave(self.settings.samples)
        for rows in order.split(self.settings.samples):
            yield drawn[rows].to(device), classes[rows].to(device)

    def state(self) -> dict[str, Tensor]:
        """What ``load_state`` takes back."""
        gaussians = {f"means/{index}": mean_CD for index, mean_CD in enumerate(self.means)}
        return gaussians | {f"covariances/{index}": cov_CDD for index, cov_CDD in enumerate(self.covs)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state`` gave."""
        tasks = range(len(state) // 2)
        self.means = [state[f"means/{index}"] for index in tasks]
        self.covs = [state[f"covariances/{index}"] for index in tasks]


def _root(cov_CDD: Tensor) -> Tensor:
    """L (C x D x D) with ``L L^T`` the covariances plus the ridge."""
    ridge_DD = _RIDGE * torch.eye(cov_CDD.shape[1], dtype=torch.float64)
    root_CDD, failed_C = torch.linalg.cholesky_ex(cov_CDD.double() + ridge_DD)
    if failed_C.any():
        # Large covariances, rounded to float32, may have eigenvalues further below zero than the ridge is above.
        values_CD, vectors_CDD = torch.linalg.eigh(cov_CDD[failed_C > 0].double())
        root_CDD[failed_C > 0] = vectors_CDD * (values_CD.clamp_min(0) + _RIDGE).sqrt()[:, None]
    return root_CDD.float()


def align(heads: nn.ModuleList, epochs: Iterable[Iterable[Drawn]], settings: AlignmentSettings) -> None:
    """Train all classifiers on drawn features: SGD with momentum 0.9, one cosine over the epochs, from a fresh start.

    The first worker's result is everyone's.
    """
    parameters = list(heads.parameters())
    optimizer = torch.optim.SGD(parameters, lr=settings.lr, momentum=0.9, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.epochs)
    for batches in epochs:
        for features, classes in batches:
            optimizer.zero_grad()
            logits = [head(features) for head in heads]
            scores = (
                torch.cat(logits, dim=1) if settings.temperature is None else normalised(logits, settings.temperature)
            )
            nn.functional.cross_entropy(scores, classes).backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(distributed.from_first(parameter))
            parameter.grad = None


def normalised(logits: list[Tensor], temperature: float) -> Tensor:
    """All tasks' logits divided by the mean over tasks of their norms, and by ``temperature``."""
    norms = torch.stack([task.norm(dim=1) + 1e-7 for task in logits]).mean(0)
    return torch.cat(logits, dim=1) / norms[:, None] / temperature
