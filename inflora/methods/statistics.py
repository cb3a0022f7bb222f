"""What is known of a task's images without keeping any: covariances of layers' inputs, Gaussians of classes' features.

Everything is summed over all workers before it is used, so that all of them work with the same numbers.
Shapes: C classes of the task, D width.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from inflora import distributed
from inflora.backbone import gather_covariance
from inflora.methods.base import TaskData
from inflora.model import ContinualModel


def input_covariances(model: ContinualModel, data: TaskData, moment: str) -> dict[str, Tensor]:
    """Uncentred covariance (D x D) of what each adapted layer reads, in one augmented pass over the task's images.

    Raises:
        FloatingPointError: They are not finite numbers.
    """
    covariances = data.once(moment, lambda: _input_covariances(model, data, moment))
    _require_finite(covariances.values(), f"inputs of the adapted layers {moment}", data)
    return {name: covariance.to(model.device) for name, covariance in covariances.items()}


def _input_covariances(model: ContinualModel, data: TaskData, moment: str) -> dict[str, Tensor]:
    with torch.no_grad(), gather_covariance(model) as seen:
        for batch in data.passes(f"covariance-{moment}"):
            if len(batch.images):
                model.features(batch.images)
    covariances = {}
    for name, covariance in seen.items():
        distributed.all_sum(covariance.sum_DD)
        distributed.all_sum(covariance.count)
        covariances[name] = covariance.sum_DD / covariance.count
    return covariances


@torch.no_grad()
def class_means(model: ContinualModel, data: TaskData) -> Tensor:
    """Mean feature (C x D, float64) of each of the task's classes, in one pass without augmentation.

    Zero for a class without images, as DomainNet has some in some domains.
    """
    count_C = torch.zeros(len(data.task.classes), dtype=torch.float64, device=model.device)
    sum_CD = count_C.new_zeros(len(count_C), model.width)
    for features, labels in _features(model, data):
        count_C.index_add_(0, labels, torch.ones_like(labels, dtype=count_C.dtype))
        sum_CD.index_add_(0, labels, features)
    return distributed.all_sum(sum_CD) / distributed.all_sum(count_C).clamp_min(1)[:, None]


@torch.no_grad()
def class_gaussians(model: ContinualModel, data: TaskData) -> tuple[Tensor, Tensor]:
    """Means (C x D) and unbiased covariances (C x D x D) of the features of the task's classes, float64.

    The mean of a class without images is zero, and the covariance of a class with one or none.

    Raises:
        FloatingPointError: They are not finite numbers.
    """
    # With a one beside every feature, the sum of their products has the sum of the features and their number as well.
    classes, extended = len(data.task.classes), model.width + 1
    sum_CEE = torch.zeros(classes, extended, extended, dtype=torch.float64, device=model.device)
    for features, labels in _features(model, data):
        features = nn.functional.pad(features, (0, 1), value=1.0)[labels.argsort(stable=True)]
        for sum_EE, own_BE in zip(sum_CEE, features.split(labels.bincount(minlength=classes).tolist()), strict=True):
            sum_EE.addmm_(own_BE.T, own_BE)
    distributed.all_sum(sum_CEE)
    product_CDD, sum_CD, count_C = sum_CEE[:, :-1, :-1], sum_CEE[:, -1, :-1], sum_CEE[:, -1, -1]
    mean_CD = sum_CD / count_C.clamp_min(1)[:, None]
    # In float64 this difference keeps all digits that the features have.
    cov_CDD = (product_CDD - sum_CD[:, :, None] * mean_CD[:, None]) / (count_C - 1).clamp_min(1)[:, None, None]
    _require_finite([cov_CDD], "features after", data)
    return mean_CD, cov_CDD


def _require_finite(tensors: Iterable[Tensor], what: str, data: TaskData) -> None:
    """What is decomposed next: solvers stop at other numbers with an error of their own, or never."""
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise FloatingPointError(f"the {what} task {data.task.index} are not finite; try a smaller optim.lr")


def _features(model: ContinualModel, data: TaskData) -> Iterator[tuple[Tensor, Tensor]]:
    """This worker's share: features (float64) and labels within the task, batch by batch."""
    for batch in data.plain():
        if len(batch.images):
            yield model.features(batch.images).double(), batch.labels - data.task.first_label
