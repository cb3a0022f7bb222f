"""GPU-shaped scheduling on several nodes, in one process, with GPUs in name only."""

import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import pytest
import ray

from inflora.storage import SharedFolder
from sweeps.engine.ledger.database import STUDY_FILE
from sweeps.engine.ledger.records import Outcome, best_record, trial_name
from sweeps.engine.run.cluster import Cluster
from sweeps.engine.run.nodes import check_nodes
from sweeps.engine.run.runner import run_sweep
from sweeps.engine.space.domains import Real
from sweeps.engine.space.spec import Resources

from .conftest import PAPER, sqlite

pytestmark = pytest.mark.cluster

SPOT_WATCHER = Path(__file__).parents[2] / "cluster" / "spot_watcher.py"


def training(record):
    """When a trial learnt, from the start of its first task to the end of its last, in ms."""
    first, last = record.reports[0], record.reports[-1]
    return first.time_ms - 1000 * first.seconds, last.time_ms


@pytest.mark.slow
def test_more_drivers_than_gpus_wait_their_turn_and_a_stopped_trial_hands_its_gpu_on(nodes, tiny_sweep, tmp_path):
    nodes(3, {"num_cpus": 1, "num_gpus": 0}, {"num_cpus": 1, "num_gpus": 1}, head_drives=3)
    learns, cannot_learn = PAPER | {"optim.lr": 5e-3}, PAPER | {"optim.lr": 1e-12}
    sweep = tiny_sweep.model_copy(
        update={
            "base": tiny_sweep.config({"backbone": {"name": "glyph_vit"}}),
            "space": tiny_sweep.space | {"optim.lr": Real(low=1e-12, high=1e-2, log=True)},
            "first": (learns, cannot_learn, learns | {"adapter.rank": 4}),
            "trials": 3,
            "resources": Resources(gpus_per_worker=1),
        }
    )
    records = run_sweep(sweep, tmp_path, sqlite(tmp_path), say=print).records
    assert {record.outcome for record in records} <= {Outcome.FINISHED, Outcome.PRUNED}
    in_turn = sorted(training(record) for record in records)
    first = min(records, key=training)
    assert records[1].outcome is Outcome.PRUNED or first is records[1], "behind those that learn"
    assert all(end <= start for (_, end), (start, _) in pairwise(in_turn)), "one GPU, one trial"
    started = [record.start_ms for record in records]
    assert max(started) < in_turn[0][1], "all three drivers were there while the first trial learnt"


@pytest.mark.slow
def test_fractions_fill_the_gpus_of_all_nodes_and_no_more(nodes, tiny_sweep, tmp_path):
    nodes(4, {"num_cpus": 4, "num_gpus": 1}, {"num_cpus": 4, "num_gpus": 1})
    sweep = tiny_sweep.model_copy(
        update={
            "base": tiny_sweep.config({"optim.epochs": 3}),
            "trials": 6,
            "executor": "inline",
            "resources": Resources(gpus_per_worker=0.5),
            "grace_tasks": 5,
        }
    )
    records = run_sweep(sweep, tmp_path, sqlite(tmp_path), say=print).records
    assert [record.outcome for record in records] == [Outcome.FINISHED] * 6
    spans = [training(record) for record in records]
    at_once = max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)
    assert 2 <= at_once <= 4


@pytest.mark.slow
def test_a_sweep_waits_for_a_node_that_is_still_to_come(nodes, tiny_sweep, tmp_path, capsys):
    address = nodes(1)
    ray_start = f"{Path(sys.executable).with_name('ray')} start --address={address} --num-cpus=1 --block"
    start = f"sleep 15; exec {ray_start} --resources='{{\"trial_driver\": 1}}'"
    late = subprocess.Popen(["bash", "-c", start], stdout=subprocess.DEVNULL)
    try:
        (record,) = run_sweep(
            tiny_sweep.model_copy(update={"trials": 1}), tmp_path, sqlite(tmp_path), say=print
        ).records
    finally:
        late.terminate()
        late.wait()
    assert record.outcome is Outcome.FINISHED
    assert "waiting for nodes: a trial needs 1 workers of 1 CPUs" in capsys.readouterr().out


@pytest.mark.slow
def test_a_machine_that_trains_also_drives_so_that_the_head_holds_nothing_of_a_trial(nodes, tiny_sweep, tmp_path):
    """Two machines for two trials: each has one trial's driver, controller and worker; the head has none of them."""
    nodes(2, *[{"num_cpus": 1, "resources": {"trial_driver": 1}}] * 2)
    head = ray.get_runtime_context().get_node_id()
    sweep = tiny_sweep.model_copy(update={"trials": 4, "early_stopping": "none"})
    seen: list[dict[str, str]] = []

    def look(ended: threading.Event) -> None:
        while not ended.wait(1.0):
            actors = ray._private.state.actors().values()
            alive = [actor for actor in actors if actor["State"] == "ALIVE"]
            seen.append({each["ActorID"]: f"{each['ActorClassName']} {each['Address']['NodeID']}" for each in alive})

    ended = threading.Event()
    looking = threading.Thread(target=look, args=(ended,))
    looking.start()
    records = run_sweep(sweep, tmp_path, sqlite(tmp_path), say=print).records
    ended.set()
    looking.join()
    assert [record.outcome for record in records] == [Outcome.FINISHED] * 4
    where = {line for actors in seen for line in actors.values()}
    kinds = {line.partition(" ")[0] for line in where}
    assert {"ImplicitFunc", "TrainController"} < kinds, kinds
    assert not [line for line in where if line.endswith(head)]
    machines = [sorted(line.rpartition(" ")[2] for line in actors.values()) for actors in seen]
    assert any(len(set(each)) == 2 for each in machines), "both at a time"


@pytest.mark.slow
def test_a_node_that_has_just_died_does_not_keep_a_sweep_from_starting(nodes, tmp_path):
    nodes(1, {"num_cpus": 1})
    (worker,) = nodes.cluster.worker_nodes
    raylet = worker.all_processes["raylet"][0].process
    raylet.kill()
    raylet.wait()
    assert all(node["Alive"] for node in ray.nodes()), "not known to be dead yet"
    check_nodes(SharedFolder(str(tmp_path)))
    assert not all(node["Alive"] for node in ray.nodes())


@pytest.mark.parametrize("executor", ["inline", pytest.param("train", marks=pytest.mark.slow)])
def test_a_sweep_whose_shared_place_is_a_bucket_goes_on_from_it(nodes, bucket, tiny_sweep, tmp_path, executor):
    nodes(1, {"num_cpus": 1, "resources": {"trial_driver": 1}})
    sweep = tiny_sweep.model_copy(update={"trials": 2, "grace_tasks": 5, "executor": executor})
    cluster = Cluster(shared=f"{bucket}/sweeps-{executor}")
    before = run_sweep(sweep, tmp_path / "head", sqlite(tmp_path), cluster=cluster, say=print).records
    assert [record.outcome for record in before] == [Outcome.FINISHED] * 2
    assert not (tmp_path / "head" / "trials").exists(), "checkpoints are in the bucket"
    best = best_record(before)
    name = trial_name(sweep.study_name, best.number, sweep.config(best.settings))
    assert SharedFolder(f"{bucket}/sweeps-{executor}/tiny").folders("trials") == {name}, "the other's are deleted"

    after = run_sweep(sweep, tmp_path / "new-head", sqlite(tmp_path), cluster=cluster, say=print)
    assert (after.records, after.complete) == (before, True)
    assert (tmp_path / "new-head" / STUDY_FILE).exists()


class Metadata(BaseHTTPRequestHandler):
    """What Amazon tells a machine about itself; the machine is taken back once it has asked twice."""

    asked = 0

    def do_PUT(self):
        self._answer("token")

    def do_GET(self):
        assert self.headers["X-aws-ec2-metadata-token"] == "token"
        Metadata.asked += 1
        end = datetime.now(UTC) + timedelta(seconds=120)
        self._answer(end.strftime("%Y-%m-%dT%H:%M:%SZ") if Metadata.asked > 2 else None)

    def _answer(self, text):
        self.send_response(404 if text is None else 200)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, *arguments):
        pass


@pytest.mark.slow
def test_a_spot_machine_that_is_taken_back_is_drained(nodes, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # the watcher's PID lies there
    nodes(1, {"num_cpus": 1})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    watcher = [sys.executable, str(SPOT_WATCHER), f"http://127.0.0.1:{server.server_port}"]
    try:
        done = subprocess.run(watcher, capture_output=True, text=True, timeout=120)
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert Metadata.asked == 3
    deadline = time.monotonic() + 30
    while all(node["Alive"] for node in ray.nodes()) and time.monotonic() < deadline:
        time.sleep(0.2)
    # Nothing ran on it, so there was nothing to wait for.
    assert [node["DeathReasonMessage"] for node in ray.nodes() if not node["Alive"]] == ["spot machine is taken back"]
