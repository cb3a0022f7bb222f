"""How far the features of old tasks' images have moved since their task was learnt.

A few evaluation images of every task are looked at again after each later task; nothing is learnt from them.
"""

import torch
from torch import Tensor

from inflora import distributed
from inflora.data.loader import Input, evaluation_batches
from inflora.data.store import Images
from inflora.data.stream import Task
from inflora.model import ContinualModel

_IMAGES = 64


@torch.no_grad()
def probe(model: ContinualModel, images: Images, task: Task, input: Input) -> Tensor:
    """Features (up to 64 x D, on the CPU) of evaluation images spread evenly over the task's."""
    count = min(_IMAGES, len(task.eval_rows))
    rows = task.eval_rows[torch.linspace(0, len(task.eval_rows) - 1, count).long()]
    features = torch.zeros(count, model.width, device=model.device)
    mine = [model.features(batch.images) for batch in evaluation_batches(images, rows, input, _IMAGES)]
    if mine:
        features[distributed.rank() :: distributed.world_size()] = torch.cat(mine)
    return distributed.all_sum(features).cpu()


def drift(before: Tensor, now: Tensor) -> float:
    """Mean over images of ``|now - before| / |before|``, for features (N x D) of the same images."""
    return float(((now - before).norm(dim=1) / before.norm(dim=1).clamp_min(1e-12)).mean())
