"""Runs that agree on their first task compute it once, and nobody can tell from the results."""

import threading
from pathlib import Path

import pytest
import torch

from inflora.config import override
from inflora.continual import run
from inflora.shared import Shared, keys_of
from inflora.storage import SharedFolder
from inflora.training import train_task


def results(config, shared=None):
    return [(r.losses, r.metrics, {**r.state.model, **r.state.method}) for r in run(config, shared=shared)]


def same(ours, theirs):
    for (losses, metrics, tensors), (losses_2, metrics_2, tensors_2) in zip(ours, theirs, strict=True):
        assert losses == losses_2
        assert metrics == metrics_2
        assert tensors.keys() == tensors_2.keys()
        assert all(torch.equal(tensors[name], tensors_2[name]) for name in tensors)


def at(place):
    return Shared(SharedFolder(str(place)))


def other(config, **changes):
    return override(config, {name.replace("__", "."): value for name, value in changes.items()})


def test_another_energy_learns_the_first_task_from_what_is_shared_to_the_same_bits(tiny, tmp_path):
    first, second = other(tiny, method__energy=0.9), other(tiny, method__energy=0.99)
    alone = results(second)
    same(results(first, at(tmp_path)), results(first))
    shared = at(tmp_path)
    same(results(second, shared), alone)
    assert shared.saved_s > 0
    assert len(list(tmp_path.iterdir())) == 3, "the two covariances and the trained first task"


def test_another_rank_shares_only_what_comes_before_training(tiny, tmp_path):
    results(tiny, at(tmp_path))
    ours = other(tiny, method__rank=7)
    same(results(ours, at(tmp_path)), results(ours))
    assert len(list(tmp_path.iterdir())) == 5


def test_a_first_task_that_is_there_is_not_trained_again(tiny, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(
        "inflora.continual.train_task", lambda *args: trained.append(args[2].index) or train_task(*args)
    )
    results(tiny, at(tmp_path))
    results(other(tiny, method__energy=0.8), at(tmp_path))
    assert trained == [0, 1, 2, 3, 4, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["sequential", "frozen", "joint"])
def test_every_method_may_share(tiny, tmp_path, name):
    config = override(tiny, {"method.name": name})
    alone = results(config)
    same(results(config, at(tmp_path)), alone)
    same(results(config, at(tmp_path)), alone)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"data.order_seed": 3},
        {"optim.batch_size": 64},
        {"data.augment": "none"},
        {"method.blocks": 1},
    ],
)
def test_what_changes_the_first_task_changes_both_keys(tiny, change):
    ours, theirs = keys_of(tiny, "x"), keys_of(override(tiny, change), "x")
    assert ours["before"] != theirs["before"]
    assert ours["after"] != theirs["after"]


@pytest.mark.parametrize("change", [{"optim.lr": 1e-3}, {"optim.epochs": 3}, {"method.rank": 7}])
def test_what_changes_training_changes_the_key_after_it(tiny, change):
    ours, theirs = keys_of(tiny, "x"), keys_of(override(tiny, change), "x")
    assert ours["before"] == theirs["before"]
    assert ours["after"] != theirs["after"]


@pytest.mark.parametrize(
    "change", [{"method.energy": 0.9}, {"method.memory": "gpm"}, {"method.energy_of": "inputs"}, {"device": "auto"}]
)
def test_what_is_felt_later_changes_neither(tiny, change):
    if torch.cuda.is_available() and "device" in change:
        pytest.skip("another device is another result")
    assert keys_of(tiny, "x") == keys_of(override(tiny, change), "x")


def test_another_backbone_or_dataset_is_another_key(tiny):
    assert keys_of(tiny, "x") != keys_of(tiny, "y")


def test_many_at_a_time_find_all_or_nothing(tmp_path):
    value = {"a": torch.arange(200_000, dtype=torch.float64)}
    wrong: list[str] = []

    def use() -> None:
        for key in range(20):
            found = at(tmp_path).once(str(key), lambda: value)
            if not torch.equal(found["a"], value["a"]):
                wrong.append(str(key))

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert {path.suffix for path in tmp_path.iterdir()} == {".sealed"}, "no half-written file stays"


DAMAGES = {"cut": lambda whole: whole[:-1], "flipped": lambda whole: whole[:-1] + bytes([whole[-1] ^ 1])}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_computed_again(damage, tmp_path):
    at(tmp_path).once("key", lambda: {"a": torch.ones(3)})
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    shared = at(tmp_path)
    assert torch.equal(shared.once("key", lambda: {"a": torch.zeros(3)})["a"], torch.zeros(3))
    assert shared.saved_s == 0.0


def test_a_bucket_is_as_good_as_a_folder(tiny, bucket):
    first, second = other(tiny, method__energy=0.9), other(tiny, method__energy=0.99)
    same(results(first, at(f"{bucket}/shared")), results(first))
    shared = at(f"{bucket}/shared")
    same(results(second, shared), results(second))
    assert shared.saved_s > 0


@pytest.mark.parametrize("address", ["s3://no-such-bucket/shared", "/dev/null/shared"])
def test_a_place_that_cannot_be_reached_costs_a_computation_and_nothing_else(bucket, address, caplog):
    shared = at(address)
    assert torch.equal(shared.once("key", lambda: {"a": torch.ones(1)})["a"], torch.ones(1))
    assert shared.saved_s == 0.0
    assert f"could not be kept in {address}" in caplog.text


def test_nothing_is_shared_unless_a_folder_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert torch.equal(Shared().once("key", lambda: {"a": torch.ones(1)})["a"], torch.ones(1))
    assert list(Path().iterdir()) == []
