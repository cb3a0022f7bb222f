"""Statistics of a task's features: numbers, means, scatters and covariances of its classes.

Everything is summed over all workers before it is used, so that all of them work with the same numbers.
Shapes: C classes of the task, N features, D width. All in float64.
"""

import torch
from torch import Tensor

from inflora import distributed
from inflora.features import Features


def one_hot(labels_N: Tensor, classes: int) -> Tensor:
    """Ones (N x C) where an image is of a class."""
    return (labels_N[:, None] == torch.arange(classes, device=labels_N.device)).double()


def class_means(seen: Features) -> tuple[Tensor, Tensor]:
    """The number (C) of each class's images and their mean feature (C x D), zero for a class without images."""
    one_hot_NC = one_hot(seen.labels_N, seen.classes)
    count_C = distributed.all_sum(one_hot_NC.sum(0))
    return count_C, distributed.all_sum(one_hot_NC.T @ seen.features_ND) / count_C.clamp_min(1)[:, None]


def pooled_scatter(seen: Features, mean_CD: Tensor) -> Tensor:
    """Sum over all features of ``(f - mu)(f - mu)^T`` (D x D), with ``mu`` the mean of the feature's class."""
    centred_ND = seen.features_ND - mean_CD[seen.labels_N]
    return distributed.all_sum(centred_ND.T @ centred_ND)


def class_covariances(seen: Features, count_C: Tensor, mean_CD: Tensor) -> Tensor:
    """Unbiased covariances (C x D x D) of each class's features; zero for a class with one image or none."""
    width = seen.features_ND.shape[1]
    scatter_CDD = seen.features_ND.new_zeros(seen.classes, width, width)
    for label, scatter_DD in enumerate(scatter_CDD):
        centred_ND = seen.features_ND[seen.labels_N == label] - mean_CD[label]
        torch.mm(centred_ND.T, centred_ND, out=scatter_DD)
    return distributed.all_sum(scatter_CDD) / (count_C - 1).clamp_min(1)[:, None, None]
