"""The names that the field gives to streams of classes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from inflora.cli import app
from inflora.config import (
    ConfigError,
    DataSettings,
    config_hash,
    dump_config,
    load_config,
    override,
    parse_config,
    sizes_named,
    stream_name,
)
from inflora.continual import run
from inflora.data.stream import make_stream
from inflora.data.tasks import in_numbers
from inflora.runs import train_into
from inflora.setup import identity

ROOT = Path(__file__).parents[1]

# B0-Inc10, B50-Inc10.


@pytest.mark.parametrize(
    ("name", "classes", "sizes"),
    [
        ("B0-Inc10", 100, (10,) * 10),
        ("B50-Inc10", 100, (50, 10, 10, 10, 10, 10)),
        ("B10-Inc10", 100, (10,) * 10),
        ("B100-Inc10", 100, (100,)),
        ("B0-Inc345", 345, (345,)),
    ],
)
def test_b_is_the_first_task_and_inc_every_further_one(name, classes, sizes):
    assert sizes_named(name, classes, "it") == sizes


@given(first=st.integers(0, 60), increment=st.integers(1, 30), tasks=st.integers(1, 9))
def test_a_stream_has_the_name_that_makes_it(first, increment, tasks):
    sizes = sizes_named(f"B{first}-Inc{increment}", first + increment * tasks, "it")
    assert sum(sizes) == first + increment * tasks
    again = stream_name(sizes)
    assert sizes_named(again, sum(sizes), "it") == sizes
    assert (again == f"B{first}-Inc{increment}") == (first != increment)


def test_a_stream_of_other_sizes_is_called_by_them():
    assert stream_name((50, 10, 20, 20)) == "50,10,20,20"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "B0-Inc3",
            r"data\.tasks=B0-Inc3 does not divide the 10 classes of digits: Inc must divide 10 \(1, 2, 5, 10\)",
        ),
        ("B4-Inc4", r"B4-Inc4 does not divide the 10 classes of digits: Inc must divide 6 \(1, 2, 3, 6\)"),
        ("B20-Inc2", r"B20-Inc2 does not divide the 10 classes of digits: B must be at most 10"),
    ],
)
def test_a_name_that_does_not_divide_the_classes_is_refused_in_one_line(name, says, digits):
    with pytest.raises(ConfigError, match=says) as error:
        make_stream(DataSettings(tasks=name), "validation")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["B0-Inc0", "b0-inc2", "B0Inc2", "B0-Inc-2", "B٣-Inc2", "ten", ""])
def test_what_is_no_name_of_a_stream_is_refused_before_any_dataset_is_read(name):
    with pytest.raises(ConfigError, match=r"data\.tasks: must be .*B0-Inc10 and B50-Inc10"):
        parse_config({"data": {"tasks": name}})


def test_a_named_stream_is_the_run_that_its_numbers_are(tiny):
    """The same settings, so the same hash: trials, states and results of the two are one another's."""
    named = in_numbers(override(tiny, {"data.tasks": "B0-Inc2"}))
    assert named == override(tiny, {"data.tasks": 5})
    assert config_hash(named) == config_hash(tiny)
    assert in_numbers(override(tiny, {"data.tasks": "B4-Inc3"})).data.tasks == (4, 3, 3)
    assert in_numbers(tiny) is tiny


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "B0-Inc2"),
        ({"data.tasks": "B4-Inc3"}, "B4-Inc3"),
        ({"data.tasks": [4, 3, 3]}, "B4-Inc3"),
        ({"data.tasks": [1, 3, 6]}, "1,3,6"),
        ({"data.joint": True}, "joint"),
    ],
)
def test_every_result_says_which_stream_it_is_of(change, name, tiny):
    assert identity(override(tiny, change))["stream"] == name


def test_a_named_stream_is_trained_and_recorded_in_numbers(tiny, tmp_path):
    config = override(tiny, {"data.tasks": "B6-Inc4", "optim.epochs": 1})
    assert len(next(run(config)).classes) == 6
    train_into(tmp_path, config, "validation")
    assert load_config(tmp_path / "config.yaml").data.tasks == (6, 4)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["identity"]["stream"] == "B6-Inc4"
    assert not {"acc/ahead", "fwt"} & result["metrics"].keys(), "no class can be answered with before it is learnt"


def test_the_command_takes_a_name_and_goes_on_from_it(tiny, tmp_path):
    (tmp_path / "run.yaml").write_text(dump_config(override(tiny, {"optim.epochs": 1})))
    command = ["train", str(tmp_path / "run.yaml"), "data.tasks=B0-Inc5", "--out", str(tmp_path / "out")]
    for resumed in ([], ["--resume"]):
        result = CliRunner().invoke(app, [*command, *resumed])
        assert result.exit_code == 0, result.output
        assert "stream B0-Inc5" in result.stdout


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"classifier": "aligned", "data.tasks": "B0-Inc10"}, "classifier aligned needs several tasks"),
        ({"data.scenario": "domain", "data.tasks": "B0-Inc10"}, "with data.scenario=domain give the number of domains"),
    ],
)
def test_a_named_stream_must_fit_the_other_settings(change, says, tiny):
    with pytest.raises(ConfigError, match=says):
        in_numbers(override(tiny, change))


def test_where_no_dataset_is_read_a_name_has_no_number_of_tasks():
    with pytest.raises(ConfigError, match=r"data\.tasks=B0-Inc2 has a number of tasks where a dataset is read"):
        _ = DataSettings(tasks="B0-Inc2").task_count


@pytest.mark.e2e
def test_a_recipe_takes_a_name_too_and_refuses_one_before_anything_is_started(digits):
    command = [sys.executable, "sweeps/digits.py", "data.tasks=B0-Inc3", "--storage", "/nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: data.tasks=B0-Inc3 does not divide the 10 classes of digits")
    assert len(done.stderr.splitlines()) == 1
