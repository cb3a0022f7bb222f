"""Nearest class mean on frozen features: nothing is trained (Mensink et al., TPAMI 2013)."""

import torch
from torch import Tensor, nn

from inflora.config import NCMSettings
from inflora.methods.base import Method, TaskData, Trainable
from inflora.methods.statistics import class_means
from inflora.model import ContinualModel


class NCM(Method[NCMSettings]):
    """An image belongs to the class whose mean feature ``mu`` is nearest.

    ``|f - mu|^2 = |f|^2 - 2 (mu f - |mu|^2 / 2)``, so that is a linear classifier: weight ``mu``, bias ``-|mu|^2 / 2``.
    """

    def trainable(self, model: ContinualModel) -> Trainable:
        return Trainable([], [])

    @torch.no_grad()
    def end_task(self, model: ContinualModel, data: TaskData) -> dict[str, Tensor]:
        means_CD = class_means(model, data)
        head = model.heads[-1]
        assert isinstance(head, nn.Linear)
        head.weight.copy_(means_CD)
        # A class without images is never the nearest.
        biases_C = torch.where(means_CD.any(dim=1), -means_CD.square().sum(1) / 2, torch.finfo(head.bias.dtype).min)
        head.bias.copy_(biases_C)
        return {}
