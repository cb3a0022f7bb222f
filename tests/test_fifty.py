"""Fifty tasks with one after the other: what is known of the first is known at the end."""

import sys
from pathlib import Path

import pytest
import torch

from inflora.continual import run
from inflora.state import load_state, save_state

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from fifty import FITTED, ORDER, ROWS, fitted_to
from one_training import shown_by
from pairs import CLASSIFIERS, Training, frozen, settings_of
from streams import STREAMS, prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("letters")
    prepare("letters", folder)
    return folder


def training(row: str) -> Training:
    adapter, changes = ROWS[row]
    return Training("letters", adapter, frozen(changes), ORDER, 0, "test", fitted_to(adapter))


def final(row: str, folder: Path) -> float:
    """The final accuracy with lda, on test images."""
    label = FITTED["lda"]
    return shown_by(training(row).config(folder), "test", {label: settings_of(label)})[label]["acc/final"]


def test_every_classifier_that_stands_for_its_kind_is_one_of_those_that_are_compared():
    assert set(FITTED) == set(CLASSIFIERS)
    assert {name: settings_of(label)["name"] for name, label in FITTED.items()} == {name: name for name in CLASSIFIERS}
    assert STREAMS["letters"].data.task_count == 50


@pytest.mark.slow
@pytest.mark.e2e
def test_inflora_keeps_nine_tenths_of_what_joint_learning_reaches(folder):
    assert final("InfLoRA, a tenth merged", folder) > 0.9 * final("joint LoRA", folder)


@pytest.mark.slow
@pytest.mark.e2e
def test_a_run_goes_on_after_its_forty_ninth_task_bit_for_bit(folder, tmp_path):
    config = training("InfLoRA, the paper's").config(folder)
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"epochs": 1})})
    results = run(config, evaluate_on="test")
    *_, before = (next(results) for _ in range(49))
    save_state(before.state, tmp_path / "state")
    last = next(results)
    (again,) = run(config, load_state(tmp_path / "state"), evaluate_on="test")
    assert again.metrics == last.metrics
    assert all(
        torch.equal(tensor, again.state.tensors[group][name])
        for group, tensors in last.state.tensors.items()
        for name, tensor in tensors.items()
    )
