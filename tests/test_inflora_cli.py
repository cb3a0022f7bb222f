"""``inflora`` as a user types it."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from inflora.cli import app
from inflora.config import AlignedSettings, InfLoRASettings, dump_config, load_config, method_of, override
from inflora.continual import run
from inflora.state import load_state, save_state


@pytest.fixture
def config_file(tiny, tmp_path) -> Path:
    """The tiny run, with one task that learns all digits, as a file."""
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_config(override(tiny, {"data.tasks": 2, "adapter": "none"})))
    return file


def inflora(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def files_under(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(result) -> bool:
    """Exit code 2, exactly one line on stderr, nothing raised through to a traceback."""
    return (
        result.exit_code == 2
        and len(result.stderr.splitlines()) == 1
        and result.stderr.startswith("error: ")
        and "Traceback" not in result.output
    )


@pytest.mark.e2e
def test_the_command_learns_every_task_prints_the_accuracies_and_keeps_the_run(tiny, tmp_path):
    (tmp_path / "tiny.yaml").write_text(dump_config(tiny))
    command = [Path(sys.executable).with_name("inflora"), "train", "tiny.yaml", "adapter.rank=3", "optim.lr=5e-4"]
    done = subprocess.run([*command, "--out", "out"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [f"task {i + 1}/5" in done.stdout for i in range(5)] == [True] * 5
    out = tmp_path / "out"
    config = load_config(out / "config.yaml")
    assert config == override(tiny, {"adapter.rank": 3, "optim.lr": 5e-4})
    result = json.loads((out / "result.json").read_text())
    assert (result["evaluated_on"], len(result["accuracy_matrix"])) == ("test", 5)
    assert f"{result['metrics']['acc/final']:.4f}" in done.stdout
    assert load_state(out / "state").is_complete


def test_the_same_command_gives_the_same_numbers(config_file, tmp_path):
    for out in ("a", "b"):
        assert inflora("train", config_file, "--out", tmp_path / out).exit_code == 0
    assert (tmp_path / "a" / "result.json").read_text() == (tmp_path / "b" / "result.json").read_text()


def test_a_published_method_is_chosen_by_its_name_and_its_settings_are_changed_beside_it(config_file, tmp_path):
    changes = ["--method", "inflora-ca", "classifier.epochs=1", "adapter.rank=3"]
    assert inflora("train", config_file, *changes, "--out", tmp_path / "out").exit_code == 0
    config = load_config(tmp_path / "out" / "config.yaml")
    assert method_of(config) == "inflora-ca"
    assert (config.classifier, config.adapter) == (AlignedSettings(epochs=1), InfLoRASettings(rank=3))


def test_validation_can_be_evaluated_instead_of_test(config_file, tmp_path):
    done = inflora("train", config_file, "--out", tmp_path / "out", "--evaluate-on", "validation")
    assert done.exit_code == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["evaluated_on"] == "validation"


BAD_SETTINGS = {
    "unknown setting": ["adapter.rnk=3"],
    "unknown group": ["adaptor.rank=3"],
    "not an assignment": ["adapter.rank"],
    "not YAML": ["adapter.rank=[1"],
    "out of range": ["optim.lr=-1"],
    "energy above one": ["adapter=inflora", "adapter.energy=1.5"],
    "rank above the width": ["adapter=inflora", "adapter.rank=33"],
    "blocks above the depth": ["adapter=inflora", "adapter.blocks=3"],
    "tasks that do not divide": ["data.tasks=3"],
    "unknown dataset": ["data.dataset=mnist"],
    "unknown adapter": ["adapter=ewc"],
    "unknown classifier": ["classifier.name=ewc"],
    "unknown method": ["--method", "ewc"],
    "old names": ["method.rank=3"],
    "nothing to align": ["data.joint=true", "classifier=aligned"],
    "unknown backbone": ["backbone.name=vit_none"],
    "not a transformer": ["backbone={name: resnet18, pretrained: false}"],
    "unadaptable": [
        "backbone={name: resnet18, pretrained: false}",
        "adapter=inflora",
    ],
    "heads that do not divide": ["backbone.options.num_heads=3"],
    "missing weights": ["backbone.weights=nowhere.safetensors"],
    "data root is a file": ["data.root=/dev/null"],
    "validation of what is trained on": ["data.train_on=train+validation", "--evaluate-on", "validation"],
    "unknown split": ["--evaluate-on", "train"],
}


@pytest.mark.parametrize("arguments", BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing_behind(arguments, config_file, tmp_path):
    result = inflora("train", config_file, "--out", tmp_path / "out", *arguments)
    assert refused(result), result.output or repr(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, b"a: [", b"- a", b"\xff\xfe"], ids=["missing", "no YAML", "list", "binary"])
def test_a_bad_config_file_is_refused_in_one_line(content, tmp_path):
    if content is not None:
        (tmp_path / "bad.yaml").write_bytes(content)
    assert refused(inflora("train", tmp_path / "bad.yaml", "--out", tmp_path / "out"))


def test_an_out_that_is_a_file_is_refused_before_anything_is_trained(config_file, tmp_path):
    (tmp_path / "out").write_text("mine")
    result = inflora("train", config_file, "--out", tmp_path / "out")
    assert refused(result), repr(result.exception)
    assert "task 1" not in result.stdout
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("name", ["", " "])
def test_an_out_without_a_name_is_refused_and_not_the_working_folder(name, config_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = files_under(tmp_path)
    assert refused(inflora("train", config_file, "--out", name))
    assert files_under(tmp_path) == before


def test_a_folder_with_a_file_that_the_run_would_write_is_refused(config_file, tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("mine")
    monkeypatch.chdir(tmp_path)
    done = inflora("train", config_file, "--out", ".")
    assert refused(done)
    assert "config.yaml" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", config_file.name}


@pytest.mark.parametrize("place", ["/proc/run", "/dev/null/run", "n" * 5000], ids=["proc", "below a file", "long"])
def test_an_out_that_cannot_be_written_is_refused_before_anything_is_trained(place, config_file):
    done = inflora("train", config_file, "--out", place)
    assert refused(done)
    assert "task 1" not in done.stdout
    assert len(done.stderr) < 300


@pytest.mark.parametrize("name", ["state", "adapters", "result.json"])
def test_what_stands_in_the_way_of_a_runs_files_is_found_before_anything_is_trained(name, config_file, tmp_path):
    out = tmp_path / "out"
    first = next(run(load_config(config_file), evaluate_on="test"))
    if name == "state":
        out.mkdir()
    else:
        save_state(first.state, out / "state")
    (out / name).mkdir() if "." in name else (out / name).write_text("mine")
    done = inflora("train", config_file, "--out", out, "--resume")
    assert refused(done)
    assert "task" not in done.stdout


def test_a_full_disk_is_one_line_and_the_last_state_stays_whole(config_file, tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    first = next(run(load_config(config_file), evaluate_on="test"))
    save_state(first.state, tmp_path / "out" / "state")
    before = files_under(tmp_path / "out")
    monkeypatch.setattr("inflora.state.os.fsync", full)
    done = inflora("train", config_file, "--out", tmp_path / "out", "--resume")
    assert refused(done)
    assert "No space left on device" in done.stderr
    assert files_under(tmp_path / "out") == before


def test_a_run_that_diverges_ends_in_one_line_that_names_the_task(tiny, tmp_path):
    (tmp_path / "tiny.yaml").write_text(dump_config(override(tiny, {"optim.epochs": 3})))
    result = inflora("train", tmp_path / "tiny.yaml", "optim.lr=1e30", "--out", tmp_path / "out")
    assert result.exit_code != 0
    assert len(result.stderr.splitlines()) == 1, repr(result.exception)
    assert "the loss of task 0" in result.stderr


# What is recorded stays.


def test_a_folder_that_holds_a_run_is_not_written_to_again(config_file, tmp_path):
    assert inflora("train", config_file, "--out", tmp_path / "out").exit_code == 0
    before = files_under(tmp_path / "out")
    result = inflora("train", config_file, "--out", tmp_path / "out")
    assert refused(result)
    assert "--resume" in result.stderr
    assert files_under(tmp_path / "out") == before


def test_another_run_cannot_be_resumed_into_a_folder(config_file, tmp_path):
    assert inflora("train", config_file, "--out", tmp_path / "out").exit_code == 0
    before = files_under(tmp_path / "out")
    assert refused(inflora("train", config_file, "seed=1", "--out", tmp_path / "out", "--resume"))
    assert refused(inflora("train", config_file, "--evaluate-on", "validation", "--out", tmp_path / "out", "--resume"))
    assert files_under(tmp_path / "out") == before


def test_resuming_a_damaged_state_is_refused(config_file, tmp_path):
    assert inflora("train", config_file, "--out", tmp_path / "out").exit_code == 0
    (tensors,) = (tmp_path / "out" / "state").glob("tensors-*")
    tensors.write_bytes(b"damaged")
    assert refused(inflora("train", config_file, "--out", tmp_path / "out", "--resume"))


def test_an_interrupted_run_is_resumed_and_ends_like_an_uninterrupted_one(config_file, tmp_path):
    assert inflora("train", config_file, "--out", tmp_path / "whole").exit_code == 0
    first = next(run(load_config(config_file), evaluate_on="test"))
    save_state(first.state, tmp_path / "cut" / "state")
    done = inflora("train", config_file, "--out", tmp_path / "cut", "--resume")
    assert done.exit_code == 0
    assert "task 1/" not in done.stdout
    assert "task 2/" in done.stdout
    whole, cut = (files_under(tmp_path / name) for name in ("whole", "cut"))
    assert list(whole.values()) == list(cut.values())


def test_resuming_a_finished_run_trains_nothing_and_keeps_its_result(config_file, tmp_path):
    assert inflora("train", config_file, "--out", tmp_path / "out").exit_code == 0
    before = files_under(tmp_path / "out")
    done = inflora("train", config_file, "--out", tmp_path / "out", "--resume")
    assert done.exit_code == 0
    assert "task 1/" not in done.stdout
    assert files_under(tmp_path / "out") == before


def test_the_kept_config_runs_as_it_is(config_file, tmp_path):
    assert inflora("train", config_file, "seed=3", "--out", tmp_path / "a").exit_code == 0
    assert inflora("train", tmp_path / "a" / "config.yaml", "--out", tmp_path / "b").exit_code == 0
    assert (tmp_path / "a" / "result.json").read_text() == (tmp_path / "b" / "result.json").read_text()
    assert yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["seed"] == 3


# Datasets.


def test_a_datasets_store_is_described(digits, data_root):
    done = inflora("data", "info", "digits", "--root", data_root)
    assert done.exit_code == 0
    assert "10 classes, 8 x 8 pixels x 1, stored raw" in done.stdout
    assert "train  1347 images" in done.stdout


def test_an_unknown_dataset_is_refused_in_one_line():
    assert refused(inflora("data", "info", "mnist"))
