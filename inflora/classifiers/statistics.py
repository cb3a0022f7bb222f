"""Statistics of a task's features: means and covariances of its classes.

Everything is summed over all workers before it is used, so that all of them work with the same numbers.
Shapes: C classes of the task, D width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from inflora import distributed
from inflora.classifiers.base import FeatureModel
from inflora.task_data import TaskData


@torch.no_grad()
def class_means(model: FeatureModel, data: TaskData, width: int) -> Tensor:
    """Mean feature (C x D, float64) of each of the task's classes, in one pass without augmentation.

    Zero for a class without images, as DomainNet has some in some domains.
    """
    count_C = torch.zeros(len(data.task.classes), dtype=torch.float64, device=data.input_format.device)
    sum_CD = count_C.new_zeros(len(count_C), width)
    for features, labels in _features(model, data):
        count_C.index_add_(0, labels, torch.ones_like(labels, dtype=count_C.dtype))
        sum_CD.index_add_(0, labels, features)
    return distributed.all_sum(sum_CD) / distributed.all_sum(count_C).clamp_min(1)[:, None]


@torch.no_grad()
def class_gaussians(model: FeatureModel, data: TaskData, width: int) -> tuple[Tensor, Tensor]:
    """Means (C x D) and unbiased covariances (C x D x D) of the features of the task's classes, float64.

    The mean of a class without images is zero, and the covariance of a class with one or none.

    Raises:
        FloatingPointError: They are not finite numbers.
    """
    # With a one beside every feature, the sum of their products has the sum of the features and their number as well.
    classes, extended = len(data.task.classes), width + 1
    sum_CEE = torch.zeros(classes, extended, extended, dtype=torch.float64, device=data.input_format.device)
    for features, labels in _features(model, data):
        features = nn.functional.pad(features, (0, 1), value=1.0)[labels.argsort(stable=True)]
        for sum_EE, own_BE in zip(sum_CEE, features.split(labels.bincount(minlength=classes).tolist()), strict=True):
            sum_EE.addmm_(own_BE.T, own_BE)
    distributed.all_sum(sum_CEE)
    product_CDD, sum_CD, count_C = sum_CEE[:, :-1, :-1], sum_CEE[:, -1, :-1], sum_CEE[:, -1, -1]
    mean_CD = sum_CD / count_C.clamp_min(1)[:, None]
    # In float64 this difference keeps all digits that the features have.
    cov_CDD = (product_CDD - sum_CD[:, :, None] * mean_CD[:, None]) / (count_C - 1).clamp_min(1)[:, None, None]
    # It is decomposed next: solvers stop at other numbers with an error of their own, or never.
    if not torch.isfinite(cov_CDD).all():
        raise FloatingPointError(f"the features after task {data.task.index} are not finite; try a smaller optim.lr")
    return mean_CD, cov_CDD


def _features(model: FeatureModel, data: TaskData) -> Iterator[tuple[Tensor, Tensor]]:
    """This worker's share: features (float64) and labels within the task, batch by batch."""
    for batch in data.plain():
        if len(batch.images):
            yield model.features(batch.images).double(), batch.labels - data.task.first_label
