"""Nearest class mean (Mensink et al., TPAMI 2013)."""

import torch
from torch import nn

from inflora.classifiers.base import FeatureModel
from inflora.classifiers.linear import LinearHeads, S
from inflora.classifiers.statistics import class_means
from inflora.task_data import TaskData


class NCM(LinearHeads[S]):
    """A feature belongs to the class whose mean feature ``mu`` is nearest.

    ``|f - mu|^2 = |f|^2 - 2 (mu f - |mu|^2 / 2)``, so that is a linear head: weight ``mu``, bias ``-|mu|^2 / 2``.
    While an adapter is trained the same head is an ordinary one, which only has to say where the adapter should go.
    """

    trained_alone = False

    @torch.no_grad()
    def fit(self, model: FeatureModel, data: TaskData) -> None:
        means_CD = class_means(model, data, self.width)
        head = self.heads[-1]
        assert isinstance(head, nn.Linear)
        head.weight.copy_(means_CD)
        # A class without images is never the nearest.
        biases_C = torch.where(means_CD.any(dim=1), -means_CD.square().sum(1) / 2, torch.finfo(head.bias.dtype).min)
        head.bias.copy_(biases_C)
