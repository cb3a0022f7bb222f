"""What classifiers are fitted to: looks at a task's training images, as they are and augmented."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from inflora import distributed
from inflora.config import DataSettings
from inflora.features import Features, features_of
from inflora.task_data import TaskData
from tests.conftest import task_of_noise


class Pixels:
    """A model whose features are its images' pixels."""

    width = 32 * 32

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)


@pytest.fixture
def data() -> TaskData:
    """24 images in batches of eight, augmented."""
    data = task_of_noise(1)
    return data._replace(input_format=data.input_format._replace(data=DataSettings()))


def seen_by_worker(data: TaskData, rank: int, of: int, monkeypatch: pytest.MonkeyPatch) -> Features:
    with monkeypatch.context() as patched:
        patched.setattr(distributed, "rank", lambda: rank)
        patched.setattr(distributed, "world_size", lambda: of)
        patched.setattr(distributed, "all_sum", lambda tensor: tensor)
        return features_of(Pixels(), data, views=2)


def test_every_image_is_seen_as_it_is_and_then_once_in_each_view(data):
    plain, seen = features_of(Pixels(), data), features_of(Pixels(), data, views=2)
    assert torch.equal(seen.features_ND[:24], plain.features_ND)
    assert torch.equal(seen.places_N, torch.arange(24).repeat(3))
    assert torch.equal(seen.labels_N, plain.labels_N.repeat(3))
    assert len(seen.features_ND.unique(dim=0)) == 72


def test_the_same_looks_before_and_after_a_task_and_others_in_the_next(data):
    again = features_of(Pixels(), data, views=2)
    assert torch.equal(features_of(Pixels(), data, views=2).features_ND, again.features_ND)
    later = data._replace(task=replace(data.task, index=2))
    same = (features_of(Pixels(), later, views=2).features_ND == again.features_ND).all(1)
    assert same.tolist() == [True] * 24 + [False] * 48


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_workers_share_out_the_looks_of_one(data, workers, monkeypatch):
    whole = features_of(Pixels(), data, views=2)
    parts = [seen_by_worker(data, rank, workers, monkeypatch) for rank in range(workers)]
    together = [torch.cat(columns) for columns in zip(*(part[:3] for part in parts), strict=True)]

    def in_order(features_ND: Tensor, labels_N: Tensor, places_N: Tensor) -> list[list[float]]:
        return sorted(torch.cat([places_N[:, None], labels_N[:, None], features_ND], 1).tolist())

    assert in_order(*together) == in_order(*whole[:3])
