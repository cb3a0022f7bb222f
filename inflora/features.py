"""A task's training images as the model sees them: what classifiers are fitted to."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from inflora import distributed
from inflora.task_data import TaskData


class FeatureModel(Protocol):
    """A model as classifiers see it: from images to features (B x D)."""

    @property
    def width(self) -> int: ...

    def features(self, images: Tensor) -> Tensor: ...


class Features(NamedTuple):
    """Features (N x D, float64) of this worker's share of a task's training images, without augmentation.

    ``labels_N`` count within the task's ``classes``; ``places_N`` are the images' places among the task's, which are
    the same on any number of workers.
    """

    features_ND: Tensor
    labels_N: Tensor
    places_N: Tensor
    classes: int


@torch.no_grad()
def features_of(model: FeatureModel, data: TaskData) -> Features:
    """Look at each of the task's training images once, in stored order.

    Raises:
        FloatingPointError: They are not finite numbers.
    """
    labels = torch.zeros(0, dtype=torch.int64, device=data.input_format.device)
    seen = [(labels.new_zeros(0, model.width, dtype=torch.float64), labels)]
    for batch in data.plain():
        if len(batch.images):
            seen.append((model.features(batch.images).double(), batch.labels - data.task.first_label))
    features_ND, labels_N = (torch.cat(parts) for parts in zip(*seen, strict=True))
    # Statistics of them are decomposed: solvers stop at other numbers with an error of their own, or never.
    if distributed.all_sum((~features_ND.isfinite()).sum()):
        raise FloatingPointError(f"the features after task {data.task.index} are not finite; try a smaller optim.lr")
    places_N = torch.arange(len(labels_N), device=labels_N.device) * distributed.world_size() + distributed.rank()
    return Features(features_ND, labels_N, places_N, len(data.task.classes))
