"""Covariances of what the adapted layers read: what adapters keep of a task's images.

Everything is summed over all workers before it is used, so that all of them work with the same numbers.
Shapes: D width of a layer's input.
"""

import torch
from torch import Tensor

from inflora import distributed
from inflora.covariance import gather_covariance
from inflora.model import ContinualModel
from inflora.task_data import TaskData


@torch.no_grad()
def input_covariances(
    model: ContinualModel, data: TaskData, moment: str, *, centred: bool = False
) -> dict[str, Tensor]:
    """Covariance (D x D) of what each adapted layer reads, in one augmented pass over the task's images.

    ``moment`` is "before" or "after" the task's training; around zero, unless it is to be ``centred``.

    Raises:
        FloatingPointError: They are not finite numbers.
    """
    with gather_covariance(model) as seen:
        for batch in data.augmented(f"covariance-{moment}"):
            if len(batch.images):
                model.features(batch.images)
    covariances = {}
    for name, covariance in seen.items():
        distributed.all_sum(covariance.sum_DD)
        distributed.all_sum(covariance.count)
        covariances[name] = covariance.sum_DD / covariance.count
        if centred:
            mean_D = distributed.all_sum(covariance.sum_D) / covariance.count
            covariances[name] -= mean_D[:, None] * mean_D
    # They are decomposed next: solvers stop at other numbers with an error of their own, or never.
    if not all(torch.isfinite(covariance).all() for covariance in covariances.values()):
        raise FloatingPointError(
            f"the inputs of the adapted layers {moment} task {data.task.index} are not finite; try a smaller optim.lr"
        )
    return covariances
