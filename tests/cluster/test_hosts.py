"""``cluster/local.yaml`` on three machines: up, submit, what a sweep must notice and survive, who is kept out, down.

In this order: each test leaves the cluster to the next as it found it, but for the last two.
"""

import json
import re
import time

import optuna
import pytest

from inflora.continual import run
from sweeps import digits
from sweeps.engine.ledger.database import study_url
from sweeps.engine.ledger.records import Outcome, best_record, trial_name
from sweeps.engine.ledger.trials import read_records

from .hosts import HOME, SHARED

pytestmark = [pytest.mark.e2e, pytest.mark.hosts, pytest.mark.timeout(900)]

TINY = ("--num-trials", "2")
RAN = (Outcome.FINISHED, Outcome.PRUNED)


def records(cluster, sweep):
    """A sweep's trials, from the study that is kept in the shared place."""
    kept = cluster.hosts.shared / "inflora" / sweep.name
    return read_records(optuna.load_study(study_name=sweep.study_name, storage=study_url(kept)))


def with_epochs(sweep, epochs):
    return sweep.model_copy(update={"base": sweep.config({"optim.epochs": epochs})})


ASK_MLFLOW = """
import json, mlflow
client = mlflow.MlflowClient()
runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
print(json.dumps([[run.info.run_name, run.info.status, run.data.metrics.get("acc/final")] for run in runs]))
"""


def test_ray_submit_runs_a_recipe_unchanged(cluster):
    done = cluster.submit("sweeps/digits.py", *TINY, "optim.epochs=1")
    assert done.returncode == 0, done.stdout
    assert "best: trial" in done.stdout
    sweep = with_epochs(digits.inflora, 1)
    trials = records(cluster, sweep)
    assert len(trials) == 2
    assert all(trial.outcome in RAN for trial in trials)
    best = best_record(trials)
    checkpoints = cluster.hosts.shared / "inflora" / sweep.name / "trials"
    assert best is not None
    assert (checkpoints / trial_name(sweep.study_name, best.number, sweep.config(best.settings))).is_dir(), (
        "what workers wrote is on the shared path"
    )

    in_mlflow = json.loads(cluster.head.shell(f"python -c '{ASK_MLFLOW}'").splitlines()[-1])
    shown = {name: (status, value) for name, status, value in in_mlflow}
    assert shown["digits"][0] == "FINISHED"
    for trial in trials:
        assert shown[f"digits-{trial.number:04d}"][1] == trial.value


@pytest.mark.slow  # test_e2e.py runs it without hosts
def test_ray_submit_runs_the_whole_path_of_another_recipe_in_small(cluster):
    done = cluster.submit("sweeps/cifar100.py", "--smoke", "--executor", "inline")
    assert done.returncode == 0, done.stdout
    assert re.search(r"trained with \S+best.yaml: [\d.]+ on test images", done.stdout)


def test_a_worker_with_other_code_is_named_before_anything_runs(cluster):
    file = next((cluster.workers[0].home / "inflora-env").glob("lib/python*/site-packages/inflora/metrics.py"))
    before = file.read_text()
    file.write_text(before + "# another version\n")
    try:
        done = cluster.submit("sweeps/digits.py", *TINY, "--sweep", "digits-frozen")
    finally:
        file.write_text(before)
    assert done.returncode != 0
    assert re.search(rf"error: node {cluster.workers[0].address} has inflora-sweeps 0\S+, the driver 0", done.stdout)
    assert "starts" not in done.stdout


def test_a_worker_that_does_not_see_the_shared_folder_is_named_before_anything_runs(cluster):
    cluster.workers[0].run("mount", "-t", "tmpfs", "tmpfs", SHARED)
    try:
        done = cluster.submit("sweeps/digits.py", *TINY, "--sweep", "digits-frozen")
    finally:
        cluster.workers[0].run("umount", SHARED)
    assert done.returncode != 0
    assert f"error: node {cluster.workers[0].address} does not see {SHARED}/inflora/digits-frozen" in done.stdout
    assert "starts" not in done.stdout


ASK = """
import http.client, sys, urllib.error, urllib.request
request = urllib.request.Request(sys.argv[2], method=sys.argv[1], headers={"Content-Type": "application/json"})
request.data = b'{"entrypoint": "touch /mnt/owned"}' if sys.argv[1] == "POST" else None
try:
    print(urllib.request.urlopen(request, timeout=10).status)
except urllib.error.HTTPError as error:
    print(error.code)
except (OSError, http.client.HTTPException):
    print("none")
"""


def ask(host, method, url):
    """What a stranger on ``host`` is answered: a status code, or none."""
    return host.run("python3", "-c", ASK, method, url).strip()


def test_a_stranger_gets_nothing_on_the_heads_outer_address(cluster):
    head = cluster.head.address
    for port in (8265, 5000):
        assert ask(cluster.laptop, "GET", f"http://{head}:{port}/") == "none"
    # Whatever else listens there (Ray's agents speak HTTP) takes no job.
    listening = re.findall(rf"(?:{re.escape(head)}\]?|\*|0\.0\.0\.0):(\d+)", cluster.head.run("ss", "-ltnH"))
    assert {"6379", "52365"} <= set(listening)
    for port in listening:
        for path in ("/api/jobs/", "/api/job_agent/jobs/"):
            answer = ask(cluster.laptop, "POST", f"http://{head}:{port}{path}")
            assert not answer.startswith(("2", "3")), f"port {port} took {path}: {answer}"
    assert not (cluster.hosts.shared / "owned").exists()


def test_a_stranger_on_the_head_is_asked_for_token_and_password(cluster):
    assert ask(cluster.head, "POST", "http://127.0.0.1:8265/api/jobs/") == "401"
    assert ask(cluster.head, "GET", "http://127.0.0.1:8265/api/jobs/") == "401"
    for path in ("experiments/search?max_results=1", "registered-models/search"):
        assert ask(cluster.head, "GET", f"http://127.0.0.1:5000/api/2.0/mlflow/{path}") == "401"


def test_only_the_token_lets_a_job_in(cluster):
    submit = "ray job submit --address http://127.0.0.1:8265 -- echo job-has-run"
    assert "job-has-run" in cluster.head.shell(submit, timeout_s=120).splitlines()
    for stranger in ("RAY_AUTH_MODE=disabled", "RAY_AUTH_TOKEN=0123456789abcdef0123456789abcdef0123456789abcdef"):
        done = cluster.head.try_run("bash", "-c", f"source ~/.bashrc; export {stranger}; {submit}", timeout_s=120)
        assert done.returncode != 0
        assert "job-has-run" not in done.stdout.splitlines()


def test_only_the_token_opens_the_cluster_from_outside(cluster):
    ray = cluster.laptop_ray
    status = ("status", "--address", f"{cluster.head.address}:6379")
    known = cluster.laptop.try_run("env", "RAY_AUTH_MODE=token", ray, *status)
    assert "Total Usage" in known.stdout
    for stranger in ("RAY_AUTH_MODE=disabled", "RAY_AUTH_TOKEN=0123456789abcdef0123456789abcdef0123456789abcdef"):
        unknown = cluster.laptop.try_run("env", "RAY_AUTH_MODE=token", stranger, ray, *status)
        assert "Total Usage" not in unknown.stdout


@pytest.mark.slow  # of lost machines a seed of test_chaos.py is in every run
def test_a_sweep_outlives_a_machine_whose_link_goes_down(cluster, tmp_path):
    log = tmp_path / "log"
    submitted = cluster.start_submit(log, "sweeps/digits.py", *TINY, "--sweep", "digits-sequential", "optim.epochs=5")
    deadline = time.monotonic() + 300
    while "task 1" not in log.read_text():  # lines and no table: ray submit gives a terminal, here a dumb one
        assert submitted.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    lost = next(machine for machine in cluster.workers if cluster.trains(machine))
    cluster.hosts.cut_off(lost)
    assert submitted.wait(timeout=500) == 0, log.read_text()
    cluster.wait_until_joined(2, patience_s=120)  # one worker was really lost

    sweep = with_epochs(digits.sequential, 5)
    trials = records(cluster, sweep)
    assert len(trials) == 2
    assert all(trial.outcome in RAN for trial in trials)
    for trial in trials:
        alone = [result.accuracies for result in run(sweep.config(trial.settings))]
        learnt = [report.accuracies for report in trial.reports]
        assert learnt == alone[: len(learnt)], "the same numbers as if nothing had happened"


def test_ray_down_ends_it(cluster):
    """As ``cluster/README.md`` says."""
    cluster.ray("exec", "cluster/local.yaml", "kill $(cat ~/mlflow/server.pid)")
    done = cluster.ray("down", "--yes", "cluster/local.yaml")
    assert done.returncode == 0, done.stdout
    assert "LISTEN" not in cluster.head.run("ss", "-ltn", "sport = :6379 or sport = :8265 or sport = :5000")
    assert (cluster.head.home / "inflora-results" / "digits" / "study.db").exists(), f"results stay in {HOME}"
