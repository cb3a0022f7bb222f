"""The checks of a GPU, rehearsed on the CPU: they pass where all is well, and each finds what it is there to find."""

import math

import numpy as np
import pytest
import torch

from inflora import cuda, gpu_check
from inflora.config import ConfigError, override
from inflora.continual import TaskResult
from inflora.gpu_check import CHECKS, Course, agree, course, exact_run, first_tasks, learnt, same
from inflora.isolated import Bench, Failed
from inflora.model import ContinualModel
from inflora.serving import Prediction
from inflora.training import Epoch
from tests.simulated_gpu import simulated_gpu

QUICK = ("device", "encoded store", "ViT-B/16", "as on the CPU", "resume")
"""The others take seconds, and are rehearsed in tests/sweeps/test_gpu_check.py."""


@pytest.fixture
def bench(digits, tmp_path) -> Bench:
    return Bench("cpu", tmp_path, digits.parent)


@pytest.fixture(scope="module")
def results(digits, tmp_path_factory):
    return first_tasks(exact_run(Bench("cpu", tmp_path_factory.mktemp("run"), digits.parent)))


@pytest.mark.parametrize("name", QUICK)
def test_a_check_passes_where_all_is_well(name, bench):
    assert CHECKS[name](bench)


@pytest.fixture
def small_on_cuda(monkeypatch):
    """The exact run on a device that is not the CPU, with the rehearsal's backbone: a simulated device is slow."""
    monkeypatch.setattr(
        gpu_check, "exact_run", lambda bench: override(exact_run(bench._replace(device="cpu")), {"device": "cuda"})
    )


@pytest.mark.parametrize("name", ["as on the CPU", "resume"])
def test_a_check_passes_on_a_device_that_is_not_the_cpu(name, bench, small_on_cuda):
    with simulated_gpu():
        assert CHECKS[name](bench._replace(device="cuda"))


def test_a_device_that_computes_wrongly_is_found(bench, small_on_cuda, monkeypatch):
    right = ContinualModel.features

    def features(model: ContinualModel, images: torch.Tensor) -> torch.Tensor:
        return right(model, images.roll(1, 0) if images.device.type == "cuda" else images)

    monkeypatch.setattr(ContinualModel, "features", features)
    with simulated_gpu(), pytest.raises(Failed, match="rounding explains"):
        CHECKS["as on the CPU"](bench._replace(device="cuda"))


# What was learnt.


@pytest.mark.parametrize("losses", [[[0.7], [0.6, 0.8]], [[0.7, math.nan]], [[math.inf], [0.1]]])
def test_a_loss_that_did_not_fall_is_found(losses, results):
    wrong = with_losses(results[1], losses)
    with pytest.raises(Failed, match="the loss of task 2 went from"):
        learnt([falling(results[0]), wrong], at_least=0.0)


@pytest.mark.parametrize("accuracy", [0.25, math.nan])
def test_an_accuracy_near_chance_is_found(accuracy, results):
    wrong = falling(results[1])._replace(metrics={"acc/seen": accuracy})
    with pytest.raises(Failed, match=r"acc/seen is .* not at least 60 %"):
        learnt([wrong], at_least=0.6)
    assert "acc/seen 90.0 %" in learnt([wrong._replace(metrics={"acc/seen": 0.9})], at_least=0.6)


def with_losses(result: TaskResult, losses: list[list[float]]) -> TaskResult:
    return result._replace(epochs=[Epoch(of_steps, 0.1, 0.1) for of_steps in losses])


def falling(result: TaskResult) -> TaskResult:
    return with_losses(result, [[0.7, 0.3]])


# Two ways to the same numbers.


def test_other_kernels_give_the_same_course(results, bench):
    with torch.backends.mkldnn.flags(enabled=False):
        same(course(first_tasks(exact_run(bench))), course(results))


def test_another_precision_is_another_course(results, bench):
    with pytest.raises(Failed, match="rounding explains"):
        same(course(first_tasks(override(exact_run(bench), {"precision": "bf16"}))), course(results))


@pytest.mark.parametrize("wrong", [2e-4, math.nan])
@pytest.mark.parametrize("what", Course._fields)
def test_every_part_of_a_course_counts(what, wrong, results):
    theirs = course(results)
    planted = {
        "losses": np.where(np.arange(len(theirs.losses)) == 3, theirs.losses + wrong, theirs.losses),
        "features": {task: features * (1 + wrong) for task, features in theirs.features.items()},
        "accuracies": [accuracy + 1000 * wrong for accuracy in theirs.accuracies],
    }
    same(theirs, theirs)
    with pytest.raises(Failed, match="rounding explains"):
        same(theirs._replace(**{what: planted[what]}), theirs)


# Predictions.


def prediction(first: float, right: str = "one") -> Prediction:
    chances = {"one": first, "two": 1 - first}
    best = sorted(chances.items(), key=lambda each: -each[1])
    return Prediction("file", tuple(best) if right == "one" else tuple(reversed(best)))


def test_predictions_that_disagree_are_found():
    assert "100 % of 2" in agree([prediction(0.9)] * 2, [prediction(0.8999)] * 2, ["one"] * 2)
    with pytest.raises(Failed, match=r"probabilities differ by 0\.1 from"):
        agree([prediction(0.9)] * 2, [prediction(0.9), prediction(0.8)], ["one"] * 2)
    with pytest.raises(Failed, match="probabilities differ by nan"):
        agree([prediction(math.nan)], [prediction(math.nan)], ["one"])


def test_predictions_that_are_mostly_wrong_are_found():
    with pytest.raises(Failed, match="33 % of 3 images are named rightly"):
        agree([prediction(0.9)] * 3, [prediction(0.9)] * 3, ["one", "two", "two"])


# What is there.


@pytest.mark.parametrize(
    "told",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12.2.0",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build",
    ],
)
def test_the_driver_is_known_from_the_kernel(told, tmp_path):
    (tmp_path / "version").write_text(told)
    assert cuda.driver_version(tmp_path / "version") == "550.54.15"


def test_the_driver_is_known_from_its_tool_where_the_kernel_does_not_tell(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cuda.driver_version(tmp_path / "version") is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 550.54.15\n")
    tool.chmod(0o755)
    assert cuda.driver_version(tmp_path / "version") == "550.54.15"
    tool.write_text("#!/bin/sh\necho NVIDIA-SMI has failed because it could not communicate with the driver.\nexit 9\n")
    assert cuda.driver_version(tmp_path / "version") is None


def test_where_no_device_is_seen_one_line_says_what_there_is(bench, monkeypatch):
    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(cuda, "driver_version", lambda: "470.82.01")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError) as refused:
        CHECKS["device"](bench._replace(device="cuda"))
    (line,) = str(refused.value).splitlines()
    for fact in ("too old (found version 11040)", "driver 470.82.01", "CUDA 13.2", "CUDA_VISIBLE_DEVICES=''"):
        assert fact in line
