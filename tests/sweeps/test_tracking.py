"""MLflow shows what the ledger holds: once, in order, whatever happens on the way."""

import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from inflora.config import ConfigError, load_config
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.trials import seal
from sweeps.engine.show.description import NOTE
from sweeps.engine.show.inputs import DataInput
from sweeps.engine.show.mirror import Mirror
from sweeps.engine.show.mlflow_store import find_trial_run, how_to_export, how_to_look, make_client
from sweeps.engine.show.tracking import StartMessage, Tracker
from sweeps.engine.space.estimate import estimate
from sweeps.engine.space.spec import Resources
from tests.waiting import until

from .conftest import PAPER, learn_all, report
from .server import Postgres, Server, free_port, needs_postgres

TAGS = {"dataset": "digits", "seed": "0", "class_order": "0,1", "split_hash": "abc", "backbone_hash": "def"}

IMAGES = [
    DataInput(
        dataset="digits", context="training", address="/data/digits", images=9, classes=3, tasks=3, dataset_hash="ab"
    )
]


@pytest.fixture
def ledger(tiny_sweep, tmp_path) -> Ledger:
    return Ledger(tiny_sweep, tmp_path)


def sqlite_uri(tmp_path) -> str:
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def all_runs(uri):
    client = MlflowClient(uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = {int(r.data.tags["inflora.trial"]): r for r in runs if "mlflow.parentRunId" in r.data.tags}
    assert len(children) + len(parents) == len(runs), "a trial has one run"
    return client, parents, children


def history(client, run, name):
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]


def three_trials(ledger):
    finished, stopped, failed = (ledger.propose().number for _ in range(3))
    learn_all(ledger, finished, [0.9, 0.8, 0.7, 0.6, 0.5])
    learn_all(ledger, stopped, [0.2, 0.1])
    ledger.report(failed, report(1, 0.3))
    ledger.fail(failed, "FloatingPointError: the loss is nan")


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "auto")])
def test_a_trials_run_says_that_it_was_on_the_cpu_where_it_asked_for_no_gpu(tiny_sweep, tmp_path, gpus, device):
    changes = {"base": tiny_sweep.config({"device": "auto"}), "resources": Resources(gpus_per_worker=gpus)}
    sweep = tiny_sweep.model_copy(update=changes)
    ledger = Ledger(sweep, tmp_path)
    learn_all(ledger, ledger.propose().number, [0.9] * 5)
    Mirror(sweep, tmp_path, sqlite_uri(tmp_path), TAGS).finish(complete=True)
    client, _, children = all_runs(sqlite_uri(tmp_path))
    assert children[0].data.params["device"] == device
    file = client.download_artifacts(children[0].info.run_id, "config.yaml", str(tmp_path))
    assert load_config(Path(file)).device == device


def test_the_store_holds_one_parent_and_every_trial_as_its_child(ledger, tiny_sweep, tmp_path):
    three_trials(ledger)
    Mirror(tiny_sweep, tmp_path, sqlite_uri(tmp_path), TAGS).finish(complete=True)
    client, (parent,), children = all_runs(sqlite_uri(tmp_path))

    assert parent.info.status == "FINISHED"
    assert parent.data.tags["inflora.best_trial"] == "0"
    assert parent.data.tags["best/adapter.rank"] == str(PAPER["adapter.rank"])
    assert parent.data.params["space/adapter.rank"] == '{"low":1,"high":16,"log":true}'
    assert not [name for name in parent.data.params if name.endswith("adapter.rank") and not name.startswith("space/")]
    assert parent.data.metrics["best/acc/final"] == 0.5
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} == {"report.html", "sweep.json"}

    assert {n: (r.info.status, r.data.tags["inflora.outcome"]) for n, r in children.items()} == {
        0: ("FINISHED", "finished"),
        1: ("KILLED", "pruned"),
        2: ("FAILED", "failed"),
    }
    first = children[0]
    assert first.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert TAGS.items() <= first.data.tags.items()
    assert {path: float(first.data.params[path]) for path in PAPER} == PAPER
    assert history(client, first, "acc/seen") == [(1, 0.9), (2, 0.8), (3, 0.7), (4, 0.6), (5, 0.5)]
    assert first.data.metrics["acc/final"] == 0.5
    names = {a.path for a in client.list_artifacts(first.info.run_id)}
    assert names == {"accuracy.json", "config.yaml"}
    accuracy = json.loads(Path(client.download_artifacts(first.info.run_id, "accuracy.json")).read_text())
    assert [len(row) for row in accuracy["accuracy_matrix"]] == [1, 2, 3, 4, 5]
    assert children[2].data.tags["inflora.reason"] == "FloatingPointError: the loss is nan"
    assert "acc/final" not in children[1].data.metrics, "a stopped trial has no final value"


def test_estimates_stand_beside_scores_and_one_run_is_marked_as_the_one_to_train(tiny_sweep, tmp_path):
    sweep = tiny_sweep.model_copy(update={"early_stopping": "none", "sampler": "random", "trials": 6})
    ledger = Ledger(sweep, tmp_path)
    ledger.note_images(350)
    mirror = Mirror(sweep, tmp_path, sqlite_uri(tmp_path), TAGS)
    uri = sqlite_uri(tmp_path)

    def chosen():
        return [n for n, run in all_runs(uri)[2].items() if run.data.tags.get("inflora.chosen") == "true"]

    for accuracy in (0.7, 0.8, 0.6):
        learn_all(ledger, ledger.propose().number, [accuracy] * 5)
        mirror.sync()
        assert chosen() == [], "what MLflow shows in the end must not hang on when it was told"
    mirror.finish(complete=False)
    assert chosen() == [1]
    for _ in range(2):  # a second driver, which sends nothing twice
        learn_all(ledger, ledger.propose().number, [0.82] * 5)
        Mirror(sweep, tmp_path, uri, TAGS).finish(complete=False)
    known = estimate(sweep, ledger.records(), images=350)
    client, (parent,), children = all_runs(uri)
    for number, told in known.of_trials().items():
        there = children[number].data.metrics
        assert there["acc/final"] == ledger.record_of(number).value
        assert (there["estimate/mean"], there["estimate/low"], there["estimate/high"]) == pytest.approx(told, abs=1e-4)
        steps = [step for step, _ in history(client, children[number], "estimate/mean")]
        assert len(steps) == len(set(steps))
    best = known.best()
    assert chosen() == [best.number]
    assert parent.data.tags["inflora.best_trial"] == str(best.number)
    assert parent.data.metrics["best/observed"] == best.value
    assert parent.data.metrics["best/estimate"] == known.of_trials()[best.number].mean


def test_a_child_made_by_a_request_whose_answer_was_lost_is_found_and_completed(ledger, tiny_sweep, tmp_path):
    learn_all(ledger, ledger.propose().number, [0.9] * 5)
    mirror = Mirror(tiny_sweep, tmp_path, sqlite_uri(tmp_path), TAGS)
    create = mirror.client.create_run

    def create_and_lose_the_answer(*args, **kwargs):
        run = create(*args, **kwargs)
        if "inflora.trial" in kwargs["tags"]:
            raise ConnectionError
        return run

    mirror.client.create_run = create_and_lose_the_answer
    with pytest.raises(ConnectionError):
        mirror.sync()
    Mirror(tiny_sweep, tmp_path, sqlite_uri(tmp_path), TAGS).finish(complete=True)
    _, (parent,), children = all_runs(sqlite_uri(tmp_path))
    assert len(children) == 1
    assert children[0].data.params["adapter.rank"] == "10"
    assert parent.data.params["base/adapter.name"] == "inflora"


def test_a_parent_whose_first_request_failed_is_completed(ledger, tiny_sweep, tmp_path):
    learn_all(ledger, ledger.propose().number, [0.9] * 5)
    mirror = Mirror(tiny_sweep, tmp_path, sqlite_uri(tmp_path), TAGS)

    def refuse(*args, **kwargs):
        raise ConnectionError

    mirror.client.log_text = refuse
    with pytest.raises(ConnectionError):
        mirror.sync()
    Mirror(tiny_sweep, tmp_path, sqlite_uri(tmp_path), TAGS).finish(complete=True)
    client, (parent,), _ = all_runs(sqlite_uri(tmp_path))
    assert parent.data.params["base/adapter.name"] == "inflora"
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} == {"report.html", "sweep.json"}


def test_a_sweep_that_was_interrupted_is_not_shown_as_finished(ledger, tiny_sweep, tmp_path):
    ledger.propose()
    Mirror(tiny_sweep, tmp_path, sqlite_uri(tmp_path), TAGS).finish(complete=False)
    _, (parent,), children = all_runs(sqlite_uri(tmp_path))
    assert (parent.info.status, children[0].info.status) == ("KILLED", "KILLED")


def test_a_trial_that_was_interrupted_goes_on_in_the_same_run(tiny_sweep, tmp_path):
    first = Ledger(tiny_sweep, tmp_path)
    first.report(first.propose().number, report(1, 0.9))
    Mirror(tiny_sweep, tmp_path, sqlite_uri(tmp_path), TAGS).finish(complete=False, over="time budget spent")
    _, (parent,), _ = all_runs(sqlite_uri(tmp_path))
    assert parent.data.tags["inflora.ended_early"] == "time budget spent"

    second = Ledger(tiny_sweep, tmp_path)
    number = second.propose().number
    mirror = Mirror(tiny_sweep, tmp_path, sqlite_uri(tmp_path), TAGS)
    second.report(number, report(2, 0.8))
    mirror.sync()
    client, _, children = all_runs(sqlite_uri(tmp_path))
    assert children[number].info.status == "RUNNING"
    learn_all(second, number, [0.9, 0.8, 0.7, 0.6, 0.5])
    mirror.finish(complete=True)
    client, (parent,), children = all_runs(sqlite_uri(tmp_path))
    assert children[number].info.status == parent.info.status == "FINISHED"
    assert [step for step, _ in history(client, children[number], "acc/seen")] == [1, 2, 3, 4, 5]
    assert parent.data.tags["inflora.ended_early"] == ""


def test_looking_a_run_up_changes_nothing(ledger, tiny_sweep, tmp_path):
    three_trials(ledger)
    Mirror(tiny_sweep, tmp_path, sqlite_uri(tmp_path), TAGS).finish(complete=True)
    _, (parent,), children = all_runs(sqlite_uri(tmp_path))
    found = find_trial_run(sqlite_uri(tmp_path), "digits", ledger.study, 0)
    assert found == children[0].info.run_id
    assert find_trial_run(sqlite_uri(tmp_path), "digits", ledger.study, 99) is None
    assert all_runs(sqlite_uri(tmp_path))[1][0].info.status == parent.info.status == "FINISHED"


def test_a_sweep_that_is_begun_anew_or_by_somebody_else_has_runs_of_its_own(tiny_sweep, tmp_path):
    uri, found = sqlite_uri(tmp_path), []
    for folder, accuracy in (("mine", 0.9), ("theirs", 0.5)):
        ledger = Ledger(tiny_sweep, tmp_path / folder)
        learn_all(ledger, ledger.propose().number, [accuracy] * 5)
        Mirror(tiny_sweep, tmp_path / folder, uri, TAGS).finish(complete=True)
        found.append(find_trial_run(uri, "digits", ledger.study, 0))
    client = MlflowClient(uri)
    assert [client.get_run(run).data.metrics["acc/final"] for run in found] == [0.9, 0.5]
    assert len({client.get_run(run).data.tags["mlflow.parentRunId"] for run in found}) == 2


def test_a_study_of_an_earlier_version_goes_on_in_its_runs(tiny_sweep, tmp_path):
    ledger = Ledger(tiny_sweep, tmp_path)
    ledger.study.set_user_attr("key", seal(""))
    learn_all(ledger, ledger.propose().number, [0.9] * 5)
    Mirror(tiny_sweep, tmp_path, sqlite_uri(tmp_path), TAGS).sync()
    again = Ledger(tiny_sweep, tmp_path)
    learn_all(again, again.propose().number, [0.8] * 5)
    Mirror(tiny_sweep, tmp_path, sqlite_uri(tmp_path), TAGS).sync()
    _, parents, children = all_runs(sqlite_uri(tmp_path))
    assert (len(parents), sorted(children)) == (1, [0, 1])


def test_sending_twice_is_sending_once_also_for_a_second_driver(ledger, tiny_sweep, tmp_path):
    running = ledger.propose().number
    ledger.report(running, report(1, 0.9))
    Mirror(tiny_sweep, tmp_path, sqlite_uri(tmp_path), TAGS).sync()
    second = Mirror(tiny_sweep, tmp_path, sqlite_uri(tmp_path), TAGS)
    second.sync()
    second.sync()
    for done in range(2, 6):
        ledger.report(running, report(done, 0.9))
    ledger.close(running)
    second.finish(complete=True)
    client, parents, children = all_runs(sqlite_uri(tmp_path))
    assert (len(parents), len(children)) == (1, 1)
    assert history(client, children[running], "acc/seen") == [(done, 0.9) for done in range(1, 6)]
    assert children[running].info.status == "FINISHED"


@pytest.mark.cluster
def test_a_server_that_dies_and_returns_misses_nothing(ledger, tiny_sweep, tmp_path):
    port = free_port()
    server = Server(tmp_path, port).ready()
    tracker = Tracker(tiny_sweep, tmp_path, server.uri, TAGS, every_s=0.1)
    try:
        tracker.start()
        number = ledger.propose().number
        ledger.report(number, report(1, 0.9))
        until(lambda: find_trial_run(server.uri, "digits", ledger.study, number))
        server.kill()
        start = time.monotonic()
        for done in range(2, 6):
            ledger.report(number, report(done, 0.9))
        ledger.close(number)
        assert time.monotonic() - start < 5, "training does not wait for the server"
        time.sleep(2)
        server = Server(tmp_path, port).ready()
        assert tracker.close(patience_s=60)
        client, parents, children = all_runs(server.uri)
        assert (len(parents), len(children)) == (1, 1)
        assert history(client, children[number], "acc/seen") == [(done, 0.9) for done in range(1, 6)]
        assert children[number].info.status == "FINISHED"
    finally:
        server.kill()


def test_a_server_that_never_answers_does_not_hold_the_sweep(ledger, tiny_sweep, tmp_path):
    tracker = Tracker(tiny_sweep, tmp_path, f"http://127.0.0.1:{free_port()}", TAGS, every_s=0.1)
    tracker.start()
    learn_all(ledger, ledger.propose().number, [0.9] * 5)
    assert not tracker.close(patience_s=1.0)
    assert not tracker.is_alive()
    assert tracker.pid is None


def test_a_password_is_in_nothing_that_is_said_of_a_server_that_does_not_answer(ledger, tiny_sweep, tmp_path, caplog):
    uri = f"http://somebody:secret@127.0.0.1:{free_port()}"
    tracker = Tracker(tiny_sweep, tmp_path, uri, TAGS, every_s=0.1)
    tracker.start()
    assert not tracker.close(patience_s=1.0)
    assert "MLflow has not taken everything" in caplog.text
    assert "127.0.0.1" in caplog.text and "secret" not in caplog.text
    with pytest.raises(ConfigError) as refused:
        find_trial_run(uri, "digits", ledger.study, 0)
    shown = [*how_to_look(uri, "digits"), how_to_export(tmp_path, uri), str(refused.value)]
    assert [line for line in shown if "secret" in line or "127.0.0.1" not in line] == []


@pytest.mark.cluster
@pytest.mark.slow
def test_a_finished_sweep_with_a_store_that_cannot_be_says_so_and_does_not_end_well(recipe):
    recipe.run("--executor", "inline", "--num-trials", "1")
    elsewhere = ("--executor", "inline", "--num-trials", "1", "--tracking-uri", "sqlite:////nonexistent/mlflow.db")
    assert recipe.start(*elsewhere).wait(timeout=280) == 1
    said = recipe.log.read_text()
    assert "the tracking store sqlite:////nonexistent/mlflow.db cannot be made: there is no folder /nonexistent" in said
    assert (
        "MLflow at sqlite:////nonexistent/mlflow.db has not taken everything; the same command sends the rest" in said
    )


def is_over(pid):
    """Whether a process has ended; nobody may have asked how yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def steps_in_mlflow(uri, study, number):
    run = find_trial_run(uri, "digits", study, number)
    return [m.step for m in MlflowClient(uri).get_metric_history(run, "acc/seen")] if run else []


@pytest.mark.cluster
def test_a_process_that_is_killed_is_replaced_and_what_it_had_not_sent_is_sent(ledger, tiny_sweep, tmp_path, caplog):
    uri = sqlite_uri(tmp_path)
    make_client(uri).search_experiments()  # the store is there before two look at it
    tracker = Tracker(tiny_sweep, tmp_path, uri, TAGS, every_s=0.1)
    tracker.start()
    number = ledger.propose().number
    ledger.report(number, report(1, 0.9))
    until(lambda: steps_in_mlflow(uri, ledger.study, number) == [1])
    first = tracker.pid
    os.kill(first, signal.SIGKILL)
    ledger.report(number, report(2, 0.9))
    until(lambda: steps_in_mlflow(uri, ledger.study, number) == [1, 2])
    assert tracker.pid != first
    assert "has ended (exit code -9)" in caplog.text
    os.kill(tracker.pid, signal.SIGKILL)
    learn_all(ledger, number, [0.9] * 5, after=2)
    assert tracker.close()
    client, parents, children = all_runs(uri)
    assert (len(parents), len(children)) == (1, 1)
    assert history(client, children[number], "acc/seen") == [(done, 0.9) for done in range(1, 6)]


@pytest.mark.cluster
@pytest.mark.parametrize("doing", ["following", "closing"])
def test_the_process_ends_with_its_driver_however_that_ends(ledger, tiny_sweep, tmp_path, doing):
    close = "threading.Thread(target=tracker.close, daemon=True).start()" if doing == "closing" else ""
    script = f"""
import logging, os, signal, threading
from pathlib import Path
from sweeps.engine.space.spec import Sweep
from sweeps.engine.show.tracking import Tracker
behind = threading.Semaphore(0)
logging.getLogger("sweeps.engine.show.tracking").addFilter(lambda record: behind.release() or True)
sweep = Sweep.model_validate_json({tiny_sweep.model_dump_json()!r})
tracker = Tracker(sweep, Path({str(tmp_path)!r}), "http://127.0.0.1:{free_port()}", {{}}, every_s=0.1)
tracker.start()
behind.acquire()
{close}
behind.acquire()
print(tracker.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    driver = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert driver.returncode == -signal.SIGKILL, driver.stderr
    assert "Connection refused" in driver.stderr
    until(lambda: is_over(int(driver.stdout)))


@pytest.mark.cluster
@pytest.mark.parametrize("said", ["", '{"complete": true, "ov'], ids=["nothing", "half a line"])
def test_a_process_whose_driver_falls_silent_ends(tiny_sweep, tmp_path, said):
    start = StartMessage(sweep=tiny_sweep, folder=tmp_path, uri="http://127.0.0.1:1", tags={}, every_s=60.0)
    command = [sys.executable, "-m", "sweeps.engine.show.mirror"]
    given = start.model_dump_json() + "\n" + said
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1


@pytest.mark.cluster
@needs_postgres
@pytest.mark.slow
def test_a_server_on_postgresql_that_dies_and_returns_misses_nothing(ledger, tiny_sweep, tmp_path):
    database = Postgres()
    port = free_port()
    server = None
    try:
        server = Server(tmp_path, port, store=database.uri).ready()
        tracker = Tracker(tiny_sweep, tmp_path, server.uri, TAGS, every_s=0.1)
        tracker.start()
        three_trials(ledger)
        until(lambda: find_trial_run(server.uri, "digits", ledger.study, 0))
        server.kill()
        learn_all(ledger, ledger.propose().number, [0.9, 0.9, 0.8, 0.8, 0.8])
        server = Server(tmp_path, port, store=database.uri).ready()
        assert tracker.close(patience_s=90)
        client, parents, children = all_runs(server.uri)
        assert len(parents) == 1
        statuses = {number: run.info.status for number, run in children.items()}
        assert statuses == {0: "FINISHED", 1: "KILLED", 2: "FAILED", 3: "FINISHED"}
        assert history(client, children[3], "acc/seen") == [(1, 0.9), (2, 0.9), (3, 0.8), (4, 0.8), (5, 0.8)]
    finally:
        if server is not None:
            server.kill()
        database.remove()


class Unwell(http.server.BaseHTTPRequestHandler):
    """A proxy before a real server: answers 500, or nothing for a while, at random, also after the work was done."""

    server_up = ""
    rng = random.Random(0)
    trouble = 0.5
    faults = 0

    def _pass_on(self):
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length) if length else None
        before, after = self.rng.random() < self.trouble / 2, self.rng.random() < self.trouble / 2
        type(self).faults += before or after
        if before:
            return self._answer(500, b"{}")
        request = urllib.request.Request(self.server_up + self.path, data=body, method=self.command)
        request.add_header("Content-Type", self.headers.get("Content-Type", "application/json"))
        try:
            with urllib.request.urlopen(request) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        return self._answer(500, b"{}") if after else self._answer(status, content)

    def _answer(self, status, content):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _pass_on

    def log_message(self, *_):
        pass


@pytest.mark.cluster
@pytest.mark.parametrize("seed", range(int(os.environ.get("INFLORA_FAULT_REPEATS", "1"))))
def test_a_server_whose_answers_fail_or_are_lost_at_random_ends_with_everything_once(
    ledger, tiny_sweep, tmp_path, seed
):
    server = Server(tmp_path, free_port()).ready()
    handler = type("Seeded", (Unwell,), {"server_up": server.uri, "rng": random.Random(seed)})
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        tracker = Tracker(tiny_sweep, tmp_path, f"http://127.0.0.1:{proxy.server_port}", TAGS, IMAGES, every_s=0.1)
        tracker.start()
        three_trials(ledger)
        until(lambda: handler.faults >= 5)
        handler.trouble = 0.0
        assert tracker.close(patience_s=90)
        client, parents, children = all_runs(server.uri)
        assert (len(parents), len(children)) == (1, 3)
        for run in (*parents, *children.values()):
            assert [each.dataset.digest for each in run.inputs.dataset_inputs] == [IMAGES[0].digest]
            assert run.data.tags[NOTE]
        assert history(client, children[0], "acc/seen") == [(1, 0.9), (2, 0.8), (3, 0.7), (4, 0.6), (5, 0.5)]
        assert {n: r.info.status for n, r in children.items()} == {0: "FINISHED", 1: "KILLED", 2: "FAILED"}
    finally:
        proxy.shutdown()
        server.kill()
