"""The product's commands, one after another, as a user types them: sweep, export, train, final."""

import contextlib
import fcntl
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from inflora.config import load_config, method_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

RECIPE = Path(__file__).parents[2] / "sweeps" / "digits.py"
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def user(tmp_path_factory, data_root):
    """A folder of the user's own with nothing in it but a copy of the recipe, and a way to type commands there."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copy(RECIPE, folder / "my_digits.py")
    environment = {**os.environ, "INFLORA_DATA": str(data_root), "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{BIN}:{environment['PATH']}"

    def command(line: str) -> subprocess.CompletedProcess:
        return subprocess.run(line.split(), cwd=folder, env=environment, capture_output=True, text=True, timeout=600)

    def typed(line: str) -> subprocess.CompletedProcess:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))
        drawing = {**environment, "TERM": "xterm-256color"}
        process = subprocess.Popen(line.split(), cwd=folder, env=drawing, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        out = b""
        with contextlib.suppress(OSError):  # the other end is closed: all is said
            while part := os.read(ours, 65536):
                out += part
        os.close(ours)
        return subprocess.CompletedProcess(line, process.wait(), out.decode(), "")

    command.folder, command.typed = folder, typed
    return command


def ok(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def swept(user):
    """Two small sweeps, of InfLoRA on a terminal and of a baseline into a pipe, and their best configs."""
    for name, run in (("digits", user.typed), ("digits-frozen", user)):
        out = ok(run(f"python my_digits.py --sweep {name} --executor inline --num-trials 2 optim.epochs=1"))
        assert "best: trial" in out
        # A table drawn again and again, or lines.
        assert (out.count("trials ended: ") > 2, "trial   0 starts" in out) == (run is not user, run is user)
        assert "mlflow ui" in out
        ok(user(f"sweeps export {name} -o {name}.yaml"))
    return user


def test_the_exported_config_says_where_it_comes_from(swept):
    config = load_config(swept.folder / "digits.yaml")
    assert config.data.train_on == "train+validation", "final training uses all training images"
    assert config.provenance["sweep"] == "digits"
    assert "acc/final" in config.provenance["validation"]
    assert config.provenance["finished"] <= config.provenance["trials"] == 2
    told = config.provenance["estimate"]
    assert told["low"] < told["mean"] < told["high"]
    assert (config.provenance["best_by"], config.provenance["observed"]) == (
        "estimate",
        config.provenance["validation"]["acc/final"],
    )
    client = MlflowClient(f"sqlite:///{swept.folder}/results/digits/mlflow.db")
    run = client.get_run(config.provenance["mlflow_run_id"])
    assert run.data.params["adapter.rank"] == str(config.adapter.rank)
    assert run.data.metrics["acc/final"] == config.provenance["validation"]["acc/final"]
    assert run.data.metrics["estimate/mean"] == told["mean"]
    assert run.data.tags["inflora.chosen"] == "true"
    ok(swept("sweeps export digits -o observed.yaml --best observed"))
    assert load_config(swept.folder / "observed.yaml").provenance["best_by"] == "observed"


def test_the_exported_config_trains_as_it_is(swept):
    out = ok(swept("inflora train digits.yaml --out trained"))
    assert "acc/final" in out
    result = json.loads((swept.folder / "trained" / "result.json").read_text())
    assert result["evaluated_on"] == "test"
    assert [len(row) for row in result["accuracy_matrix"]] == [1, 2, 3, 4, 5]
    assert (
        yaml.safe_load((swept.folder / "trained" / "config.yaml").read_text())["adapter"] == result["config"]["adapter"]
    )


@pytest.mark.slow
def test_final_sets_the_methods_side_by_side_over_seeds_with_their_models(swept):
    line = "sweeps final digits.yaml digits-frozen.yaml --seeds 0,1"
    out = ok(swept(line))
    report = json.loads((swept.folder / "results/final/report.json").read_text())
    ours, frozen = (method_of(load_config(swept.folder / f"{name}.yaml")) for name in ("digits", "digits-frozen"))
    assert set(report["summary"]) == {ours, frozen}
    assert f"| {ours} |" in out
    assert f"| {frozen} |" in out

    client = MlflowClient(f"sqlite:///{swept.folder}/results/final/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    assert len(children) == 4
    assert {r.info.status for r in runs} == {"FINISHED"}
    inflora = [r.data.metrics["acc/final"] for r in children if r.data.params["adapter.name"] == "inflora"]
    assert parent.data.metrics[f"{ours}/acc/final_mean"] == pytest.approx(sum(inflora) / 2)
    for child in children:
        model = {a.path for a in client.list_artifacts(child.info.run_id, "model")}
        learnt = {"model/adapters"} if child.data.params["adapter.name"] == "inflora" else set()
        assert model == {"model/config.yaml", "model/state"} | learnt

    before = {path: path.stat().st_mtime_ns for path in (swept.folder / "results/final").rglob("tensors-*")}
    ok(swept(line))
    after = {path: path.stat().st_mtime_ns for path in (swept.folder / "results/final").rglob("tensors-*")}
    assert after == before, "a run that is complete is not trained again"
    assert len(client.search_runs([e.experiment_id for e in client.search_experiments()])) == len(runs)


@pytest.mark.slow
def test_final_judges_a_sweeps_best_against_the_first_setting_before_it_opens_the_test_set(swept):
    out = ok(swept("sweeps final digits --top 1 --seeds 0,1 --orders 1"))
    folder = swept.folder / "results/digits/final"
    judged, report = (json.loads((folder / name).read_text()) for name in ("judged.json", "report.json"))
    assert all(each["runs"] == 2 and each["low"] < each["high"] for each in judged["estimates"].values())
    assert {judged["winner"], "first"} == set(report["summary"])
    assert "judged on validation images before the test set is opened" in out
    winner = load_config(folder / "winner.yaml")
    assert winner.data.train_on == "train+validation"
    evaluated = {file.parts[-3]: json.loads(file.read_text())["evaluated_on"] for file in folder.rglob("result.json")}
    assert set(evaluated.values()) == {"validation", "test"}

    client = MlflowClient(f"sqlite:///{swept.folder}/results/digits/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    final = [run for run in runs if run.data.tags.get("inflora.evaluated_on") == "test"]
    assert len(final) == 2 * len(report["summary"]), "beside the trials that the winner comes from"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("python my_digits.py --sweep digit", "unknown --sweep 'digit'; known: digits"),
        ("python my_digits.py --executor thread", "executor: must be 'train' or 'inline', got 'thread'"),
        ("python my_digits.py --num-trials 0", "trials: must be greater than or equal to 1, got 0"),
        ("python my_digits.py adapter.rnk=3", "unknown setting adapter.rnk; known here: name, adapt_tasks"),
        ("python my_digits.py data.tasks=3", "data.tasks must divide the 10 classes of digits (1, 2, 5, 10), got 3"),
        ("sweeps export nothing", "sweep.json is missing"),
        ("sweeps status nothing", "sweep.json is missing"),
        ("sweeps final nothing.yaml", "cannot read the config nothing.yaml"),
        ("sweeps final digits.yaml --seeds 1,1", "--seeds must be different whole numbers"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(swept, line, message):
    done = swept(line)
    assert done.returncode == 2
    (only,) = done.stderr.strip().splitlines()
    assert message in only


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["digits", "cifar100", "imagenet_r", "domainnet"])
def test_a_recipe_runs_in_small_from_the_archive_to_the_trained_model(recipe, user):
    shutil.copy(RECIPE.parent / f"{recipe}.py", user.folder / f"my_{recipe}.py")
    executor = "" if recipe == "cifar100" else " --executor inline"
    out = ok(user(f"python my_{recipe}.py --smoke{executor}"))
    assert "2 trials, judged on validation images" in out
    (trained,) = user.folder.glob(f"results/{recipe.replace('_', '-')}*-smoke/trained/result.json")
    result = json.loads(trained.read_text())
    assert result["evaluated_on"] == "test"
    assert result["config"]["data"]["dataset"] == recipe
    assert len(result["accuracy_matrix"]) == result["config"]["data"]["tasks"]
