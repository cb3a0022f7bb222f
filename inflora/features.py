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
    """Features (N x D, float64) of this worker's share of the looks at a task's training images.

    ``labels_N`` count within the task's ``classes``; ``places_N`` are the images' places among the task's, which are
    the same on any number of workers, and for all looks at an image.
    """

    features_ND: Tensor
    labels_N: Tensor
    places_N: Tensor
    classes: int


@torch.no_grad()
def features_of(model: FeatureModel, data: TaskData, views: int = 0) -> Features:
    """Look at each of the task's training images in stored order, once as they are and in so many augmented ``views``.

    Raises:
        FloatingPointError: They are not finite numbers.
    """
    places = torch.arange(len(data.task.train_rows), device=data.input_format.device)
    mine = slice(distributed.rank(), None, distributed.world_size())
    # Workers share out a plain pass as a whole, and an augmented one batch by batch.
    passes = [(data.plain(), places[mine])]
    for view in range(views):
        passes.append((data.view(view), torch.cat([batch[mine] for batch in places.split(data.optim.batch_size)])))
    seen = [(places.new_zeros(0, model.width, dtype=torch.float64), places[:0])]
    for batches, _ in passes:
        for batch in batches:
            if len(batch.images):
                seen.append((model.features(batch.images).double(), batch.labels - data.task.first_label))
    features_ND, labels_N = (torch.cat(parts) for parts in zip(*seen, strict=True))
    # Statistics of them are decomposed: solvers stop at other numbers with an error of their own, or never.
    if distributed.all_sum((~features_ND.isfinite()).sum()):
        raise FloatingPointError(f"the features after task {data.task.index} are not finite; try a smaller optim.lr")
    return Features(features_ND, labels_N, torch.cat([places_N for _, places_N in passes]), len(data.task.classes))
