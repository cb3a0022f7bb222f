"""What MLflow's pages say of a sweep: its kind, images, source, and in words what to train."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient

from inflora.config import override
from inflora.runs import train_into
from inflora.setup import identity, search_stream
from sweeps.engine.after.final import log_final, plan, summarise, write_report
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.records import Outcome, TrialRecord
from sweeps.engine.run.cluster import THIS_MACHINE
from sweeps.engine.run.preflight import preflight
from sweeps.engine.show.description import LONGEST, NOTE, code, description, plain, trial_note, within_limit
from sweeps.engine.show.inputs import data_inputs
from sweeps.engine.show.mirror import Mirror
from sweeps.engine.show.mlflow_store import (
    default_tracking_uri,
    experiment_id,
    how_to_export,
    how_to_look,
    make_client,
    own_database,
    source_tags,
)
from sweeps.engine.space.domains import Choice
from sweeps.engine.space.estimate import estimate

from .conftest import PAPER, learn_all, report
from .server import free_port

KIND = "mlflow.experimentKind"
TAGS = {"dataset": "digits"}


@pytest.fixture
def ledger(tiny_sweep, tmp_path) -> Ledger:
    return Ledger(tiny_sweep.model_copy(update={"early_stopping": "none"}), tmp_path)


@pytest.fixture
def uri(tmp_path) -> str:
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture(scope="module")
def inputs(tiny_sweep):
    return inputs_of(tiny_sweep.base)


def inputs_of(config, evaluate_on="validation"):
    return data_inputs(search_stream(config), config, evaluate_on)


def runs_of(uri):
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("inflora-digits")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    return experiment, parent, [run for run in runs if run is not parent]


def datasets(run):
    return {
        each.tags[0].value: (each.dataset.name, each.dataset.digest, json.loads(each.dataset.profile))
        for each in run.inputs.dataset_inputs
    }


class Counting:
    """A client that counts what it is asked for."""

    def __init__(self, client):
        self.client, self.asked = client, Counter()

    def __getattr__(self, name):
        self.asked[name] += 1
        return getattr(self.client, name)


# The description.


def record(number, outcome=Outcome.FINISHED, value=None, reason="", values=(), **settings):
    values = values or (() if value is None else (value,))
    return TrialRecord(number, {**PAPER, **settings}, outcome, [], value, reason, 0, 0, values)


def test_it_says_what_to_train_how_far_the_sweep_is_and_how_to_go_on(tiny_sweep):
    records = [
        record(0, value=0.7),
        record(1, Outcome.PRUNED, reason="behind others"),
        record(2, value=0.81234, **{"optim.lr": 0.001234567}),
        record(3, Outcome.RUNNING),
    ]
    text = description(tiny_sweep, records, None, export="sweeps export tiny -o best.yaml")
    decision, chosen, state, *_ = text.split("\n\n")
    assert "trial 2" in decision
    assert "acc/final 0.8123" in decision
    assert "0.7000" in decision, "beside the recipe's first setting"
    assert "optim.lr=0.001235" in chosen
    assert state == "3 of 4 trials have ended: 2 finished, 1 pruned."
    assert "sweeps export tiny -o best.yaml" in text
    assert "report.html" in text


def test_the_table_lists_the_five_best_finished_trials_that_keep_the_constraints(tiny_sweep):
    values = [0.1, 0.5, 0.3, 0.9, 0.2, 0.8, 0.4]
    records = [record(number, value=value) for number, value in enumerate(values)]
    records[3] = records[3]._replace(broken={"forgetting <= 0.1": 0.2})
    records += [record(7, Outcome.PRUNED), record(8, Outcome.FAILED, reason="nan")]
    rows = [line for line in description(tiny_sweep, records, None).splitlines() if line.startswith("| ")]
    head, *cells = [[cell.strip() for cell in row.replace("&ensp;", "").strip("|").split("|")] for row in rows]
    assert head == ["trial", "`acc/final`", "`adapter.rank`", "`adapter.energy`", "`optim.lr`"]
    assert [row[0] for row in cells] == ["5", "1", "6", "2", "4"]
    assert cells[0][1:] == ["0.8000", "10", "0.95", "0.0005"]


def test_without_a_finished_trial_there_is_nothing_to_export(tiny_sweep):
    for records in ([], [record(0, Outcome.FAILED)], [record(0, Outcome.RUNNING)]):
        text = description(tiny_sweep, records, None, export="sweeps export tiny")
        assert text.startswith("**No trial has finished yet.**")
        assert "export" not in text


LONG = st.builds(str.__mul__, st.text(max_size=20), st.sampled_from([1, 1, 40, 2000]))


@given(outcome=st.sampled_from(Outcome), texts=st.lists(LONG, min_size=1, max_size=8), reason=LONG)
@settings(max_examples=60, deadline=None)
def test_every_description_fits_into_a_tag_and_says_first_what_to_train(tiny_sweep, outcome, texts, reason):
    space = {**tiny_sweep.space, "adapter.targets": Choice(options=("q", "v"))}
    sweep = tiny_sweep.model_copy(update={"space": space})
    records = [record(n, outcome, 0.5, reason, **{"adapter.targets": text}) for n, text in enumerate(texts)]
    text = description(sweep, records, None, export="sweeps export tiny", ending=plain(reason))
    assert len(text) <= LONGEST
    assert ("Train with trial 0" in text) == (outcome is Outcome.FINISHED)
    widths = {line.count(" | ") for line in text.splitlines() if line.startswith("| ")}
    assert len(widths) <= 1, "every row has the columns of the first"
    note = trial_note(sweep, records[0])
    assert len(note) <= LONGEST
    assert len(note.splitlines()) == 1


@given(st.text())
def test_text_from_elsewhere_is_one_line_that_marks_nothing_up(text):
    shown = plain(text)
    assert not set(shown) & set("`*<>@|~[]\n")
    assert not set(code(text)[1:-1].replace("\\|", "")) & set("`|\n")


def test_what_is_too_long_is_cut_between_lines_where_there_are_any():
    assert within_limit("a\n" * LONGEST).endswith("a\n\n...")
    assert within_limit("a" * (LONGEST + 1)) == "a" * (LONGEST - 5) + "\n\n..."
    assert within_limit("a" * LONGEST) == "a" * LONGEST


# The images.


def test_the_images_are_those_of_the_stream_and_tell_what_the_identity_does(tiny_sweep, inputs):
    stream, known = search_stream(tiny_sweep.base), identity(tiny_sweep.base)
    training, validation = inputs
    assert (training.context, validation.context) == ("training", "validation")
    assert training.images + validation.images == len(stream.train.labels)
    for each in inputs:
        assert (each.classes, each.tasks) == (10, 5)
        assert (each.dataset_hash, each.split_hash) == (known["dataset_hash"], known["split_hash"])
        assert Path(each.address, "manifest.json").exists()


def test_a_digest_stands_for_all_that_is_shown_beside_it(tiny_sweep, inputs):
    digests = {each.digest for each in inputs}
    assert len(digests) == 2
    assert {each.model_copy(update={"address": "elsewhere"}).digest for each in inputs} == digests
    for change in ({"data.split_seed": 1}, {"data.tasks": 2}, {"data.validation": 0.3}):
        assert not {each.digest for each in inputs_of(override(tiny_sweep.base, change))} & digests


def test_final_training_learns_all_images_and_opens_the_test_images_whatever_the_split(tiny_sweep, inputs):
    config = override(tiny_sweep.base, {"data.train_on": "train+validation"})
    training, test = inputs_of(config, "test")
    assert training.images == sum(each.images for each in inputs)
    assert (test.context, test.images) == ("test", search_stream(config).manifest.splits["test"].images)
    assert inputs_of(override(config, {"data.split_seed": 1}), "test") == [training, test]


def test_an_address_shows_no_password(tiny_sweep):
    from_bucket = override(tiny_sweep.base, {"data.root": "s3://key:secret@bucket/data"})
    training, _ = data_inputs(search_stream(tiny_sweep.base), from_bucket, "validation")
    assert training.address == "s3://key:***@bucket/data/digits"
    assert training.entity().dataset.source_type == "s3"


# MLflow.


def test_the_experiment_opens_as_model_training_and_says_what_it_holds(ledger, tiny_sweep, tmp_path, uri):
    Mirror(tiny_sweep, tmp_path, uri, TAGS).sync()
    experiment, _, _ = runs_of(uri)
    assert experiment.tags[KIND] == "custom_model_development"
    assert "its description says what to train" in experiment.tags[NOTE]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "custom_model_development"),
        ({KIND: "no_inferred_type"}, "custom_model_development"),
        ({KIND: "genai_development_inferred"}, "custom_model_development"),
        ({KIND: "genai_development", NOTE: "mine"}, "genai_development"),
    ],
)
def test_an_older_experiment_is_completed_and_what_somebody_chose_is_kept(uri, before, after):
    client = make_client(uri)
    made = client.create_experiment("inflora-digits", tags=before)
    for _ in range(2):
        assert experiment_id(client, "digits", "acc/final") == made
    tags = client.get_experiment(made).tags
    assert tags[KIND] == after
    assert (tags[NOTE] == "mine") == (NOTE in before)


def test_artifacts_can_be_kept_where_a_copy_of_the_database_finds_them(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", str(tmp_path / "shared"))
    client = make_client(default_tracking_uri(tmp_path))
    made = client.get_experiment(experiment_id(client, "digits", "acc/final"))
    assert made.artifact_location == (tmp_path / "shared").as_uri()


def test_a_sweeps_own_database_is_told_from_everybodys(tmp_path):
    assert own_database(default_tracking_uri(tmp_path / "digits"), tmp_path / "digits") == tmp_path / "digits/mlflow.db"
    for other in (f"sqlite:///{tmp_path}/mlflow.db", "http://127.0.0.1:5000", "postgresql://here/runs"):
        assert own_database(other, tmp_path / "digits") is None


def test_every_run_has_its_images_once_and_trials_a_line(ledger, tiny_sweep, tmp_path, uri, inputs):
    for accuracy in (0.6, 0.8):
        learn_all(ledger, ledger.propose().number, [accuracy] * 5)
    failed = ledger.propose().number
    ledger.report(failed, report(1, 0.3))
    ledger.fail(failed, "FloatingPointError: the loss is nan")
    for _ in range(2):
        Mirror(tiny_sweep, tmp_path, uri, TAGS, inputs).finish(complete=True)
    _, parent, children = runs_of(uri)
    expected = {
        each.context: ("digits", each.digest, {"images": each.images, "classes": 10, "tasks": 5, **hashes(each)})
        for each in inputs
    }
    assert len(children) == 3
    for run in (parent, *children):
        assert datasets(run) == expected
        assert len(run.inputs.dataset_inputs) == 2
    notes = {int(run.data.tags["inflora.trial"]): run.data.tags[NOTE] for run in children}
    assert notes == {record.number: trial_note(tiny_sweep, record) for record in ledger.records()}
    assert "failed, FloatingPointError: the loss is nan" in notes[failed]


def hashes(each):
    return {"dataset_hash": each.dataset_hash, "split_hash": each.split_hash}


@pytest.mark.parametrize("answered", [0, 1], ids=["the sweep's", "the trial's"])
def test_images_whose_request_was_lost_are_logged_by_the_next_try(
    ledger, tiny_sweep, tmp_path, uri, inputs, answered, monkeypatch
):
    learn_all(ledger, ledger.propose().number, [0.9] * 5)
    mirror = Mirror(tiny_sweep, tmp_path, uri, TAGS, inputs)
    first_answers = iter([mirror.client.log_inputs] * answered)
    monkeypatch.setattr(mirror.client, "log_inputs", lambda *a, **k: next(first_answers, refuse)(*a, **k))
    with pytest.raises(ConnectionError):
        mirror.sync()
    Mirror(tiny_sweep, tmp_path, uri, TAGS, inputs).finish(complete=True)
    _, parent, children = runs_of(uri)
    for run in (parent, *children):
        assert set(datasets(run)) == {"training", "validation"}


def refuse(*args, **kwargs):
    raise ConnectionError


def test_the_parent_says_what_to_train_and_is_told_again_only_when_a_trial_has_ended(
    ledger, tiny_sweep, tmp_path, uri, inputs
):
    mirror = Mirror(tiny_sweep, tmp_path, uri, TAGS, inputs)
    mirror.client = client = Counting(mirror.client)
    export = how_to_export(tmp_path, uri)
    first = ledger.propose().number
    mirror.sync()
    told = client.asked["set_tag"]
    for done in range(1, 5):
        ledger.report(first, report(done, 0.9))
        mirror.sync()
        mirror.sync()
    assert client.asked["set_tag"] == told, "a task changes nothing of the decision"
    ledger.report(first, report(5, 0.9))
    ledger.close(first)
    mirror.sync()
    mirror.sync()
    assert client.asked["set_tag"] == told + 1
    assert runs_of(uri)[1].data.tags[NOTE] == description(
        tiny_sweep, ledger.records(), estimate(tiny_sweep, ledger.records()), export
    )

    mirror.finish(complete=False, over="")
    _, parent, _ = runs_of(uri)
    assert "Interrupted" in parent.data.tags[NOTE]
    Mirror(tiny_sweep, tmp_path, uri, TAGS, inputs).finish(complete=True, over="time budget spent")
    _, parent, _ = runs_of(uri)
    assert "Ended early: time budget spent." in parent.data.tags[NOTE]
    assert "Interrupted" not in parent.data.tags[NOTE]


def test_a_trial_costs_two_requests_to_begin_and_one_for_what_it_has_reported(
    ledger, tiny_sweep, tmp_path, uri, inputs
):
    mirror = Mirror(tiny_sweep, tmp_path, uri, TAGS, inputs)
    mirror.sync()
    mirror.client = client = Counting(mirror.client)
    number = ledger.propose().number
    mirror.sync()
    assert client.asked == {"create_run": 1, "log_inputs": 1, "log_batch": 1}
    for done in (1, 2):
        client.asked.clear()
        ledger.report(number, report(done, 0.9))
        mirror.sync()
        assert client.asked == {"log_batch": 1}


def test_the_page_to_open_is_that_of_training_models(ledger, tiny_sweep, tmp_path, uri):
    command = f"mlflow ui --backend-store-uri {uri}"
    assert how_to_look(uri, "digits") == [command, "http://127.0.0.1:5000"], "no database yet"
    assert not (tmp_path / "mlflow.db").exists()
    Mirror(tiny_sweep, tmp_path, uri, TAGS).sync()
    experiment, _, _ = runs_of(uri)
    page = f"/#/experiments/{experiment.experiment_id}?workflowType=machine_learning"
    assert how_to_look(uri, "digits") == [command, f"http://127.0.0.1:5000{page}"]
    away = f"http://127.0.0.1:{free_port()}"
    assert how_to_look(away, "digits") == [away]


def test_the_source_is_the_recipe_by_its_place_and_the_commit(tmp_path):
    here = Path(__file__).parents[2]
    tags = source_tags(str(here / "sweeps" / "digits.py"))
    assert (tags["mlflow.source.name"], tags["mlflow.source.type"]) == ("sweeps/digits.py", "LOCAL")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    assert tags.get("mlflow.source.git.commit", "") == head.stdout.strip()
    own = tmp_path / "mine.py"
    own.touch()
    assert source_tags(str(own))["mlflow.source.name"] == str(own.resolve())
    assert source_tags("sweeps final")["mlflow.source.name"] == "sweeps final"


def test_a_sweep_that_can_start_knows_its_source_and_images(tiny_sweep, tmp_path, uri, monkeypatch, inputs):
    monkeypatch.setattr(sys, "argv", [str(Path(__file__).parents[2] / "sweeps" / "digits.py"), "--num-trials", "3"])
    done = tiny_sweep.model_copy(update={"trials": 1})  # nothing is left to run, so no cluster is asked
    ledger = Ledger(done, tmp_path)
    learn_all(ledger, ledger.propose().number, [0.9] * 5)
    ready = preflight(done, tmp_path, uri, THIS_MACHINE, print)
    assert ready.tags["mlflow.source.name"] == "sweeps/digits.py"
    assert ready.inputs == inputs


def test_final_runs_name_all_training_images_and_the_test_images(tiny_sweep, tmp_path, uri):
    config = override(tiny_sweep.config(PAPER), {"data.train_on": "train+validation"})
    runs = plan({"inflora": config}, [0, 1], tmp_path)
    for run in runs:
        train_into(run.folder, run.config, run.evaluate_on, resume=True)
    summary = summarise(runs)
    write_report(runs, summary, tmp_path)
    for _ in range(2):
        log_final(runs, summary, tmp_path, uri)
    experiment, parent, children = runs_of(uri)
    assert experiment.tags[KIND] == "custom_model_development"
    assert len(children) == 2
    for run in (parent, *children):
        assert {context: known[2]["images"] for context, known in datasets(run).items()} == {
            each.context: each.images for each in inputs_of(config, "test")
        }
        assert run.data.tags["mlflow.source.name"] == "sweeps final"
    assert parent.data.tags[NOTE].startswith("# Final results, on test images")
    assert {"seed 0", "seed 1"} == {run.data.tags[NOTE].split(" order")[0].removeprefix("inflora ") for run in children}
