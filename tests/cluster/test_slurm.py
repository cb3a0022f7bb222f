"""``cluster/slurm.sbatch`` under a real Slurm: two jobs on the same nodes, the token, the time limit, lost nodes.

In this order: later jobs are compared with one of the two, and each of the last two tests leaves a node dead.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing

import optuna
import pytest

from sweeps import digits
from sweeps.engine.ledger.database import study_url
from sweeps.engine.ledger.records import Outcome
from sweeps.engine.ledger.trials import read_records
from tests.waiting import until

from .hosts import SHARED
from .slurm import ENVIRONMENT, Slurm, missing

pytestmark = [pytest.mark.e2e, pytest.mark.hosts, pytest.mark.timeout(900)]

SEQUENTIAL = digits.sequential.model_copy(update={"base": digits.sequential.config({"optim.epochs": 5})})
# A random sampler proposes the same trials however many run at a time.
LONG = (
    "--sweep",
    SEQUENTIAL.name,
    "--num-trials",
    "2",
    "--sampler",
    "random",
    "--executor",
    "inline",
    "optim.epochs=5",
)
TRIAL = "ray::ImplicitFunc.train"
"""The process of a trial that runs inline."""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if reason := missing():
        pytest.skip(reason)
    slurm = Slurm(tmp_path_factory.mktemp("slurm"), nodes=3)
    try:
        yield slurm
    finally:
        slurm.end()


@pytest.fixture(scope="module")
def two_jobs(slurm):
    """Two jobs on the same two nodes at the same time: the long sweep inline, another through Ray Train."""
    jobs = [
        slurm.submit("long", "sweeps/digits.py", *LONG),
        slurm.submit("short", "sweeps/digits.py", "--sweep", "digits-frozen", "--num-trials", "2"),
    ]
    for job in jobs:
        job.wait_for("Ray: joined")
    return jobs


def records(slurm, place, sweep):
    """A sweep's trials, from the copy of the study in the shared place."""
    kept = slurm.hosts.shared / place / sweep.name
    return read_records(optuna.load_study(study_name=sweep.study_name, storage=study_url(kept)))


def essence(trials):
    """What a sweep has found, without its times."""
    return [(t.number, t.settings, t.outcome, t.value, [report.accuracies for report in t.reports]) for t in trials]


def in_mlflow(slurm, place, sweep):
    """The trials' runs in the copy of MLflow's database, and where their artifacts are."""
    with closing(sqlite3.connect(slurm.hosts.shared / place / sweep.name / "mlflow.db")) as database:
        found = database.execute("SELECT name, status, artifact_uri FROM runs ORDER BY name").fetchall()
    return {name: status for name, status, _ in found}, {uri for *_, uri in found}


def signal_trial(node, signal):
    """Send a signal to a trial that trains on a node; whether there is one."""
    return node.try_run("pkill", f"--signal={signal}", "--full", TRIAL).returncode == 0


def ends_as_if_undisturbed(slurm, job, undisturbed):
    """The job has learnt, and shows in MLflow, what the other one does."""
    assert job.ends() == ("COMPLETED", "0:0"), job.output()
    assert essence(records(slurm, job.place, SEQUENTIAL)) == essence(records(slurm, undisturbed.place, SEQUENTIAL))
    assert in_mlflow(slurm, job.place, SEQUENTIAL)[0] == in_mlflow(slurm, undisturbed.place, SEQUENTIAL)[0]


def nothing_is_left(nodes):
    for node in nodes:
        assert node.run("ps", "-eo", "args", "--no-headers").count("ray") == 0
        assert {path.name for path in node.tmp.iterdir()} - node.mounted - {"slurmd"} == set()


def test_what_cannot_start_says_why_in_one_line(slurm):
    job = slurm.submit("none", "sweeps/nothing.py")
    assert job.ends() == ("FAILED", "2:0")
    assert job.output() == f"error: there is no recipe sweeps/nothing.py in {slurm.project}\n"


def test_a_job_has_a_cluster_of_its_own_with_what_slurm_has_given_it(slurm, two_jobs):
    states = slurm.type("squeue", "--noheader", "--format=%T %N").stdout.splitlines()
    assert states == ["RUNNING machine[1-2]"] * 2
    for job in two_jobs:
        assert "(2 machines, 2 CPUs, 2 GPUs)" in job.output()
    assert len({job.address() for job in two_jobs}) == 2


def test_only_the_token_opens_a_jobs_cluster(slurm, two_jobs):
    status = ("status", "--address", two_jobs[0].address())
    assert "Total Usage" in slurm.ray(slurm.nodes[1], *status).stdout
    for stranger in ("RAY_AUTH_MODE=disabled", f"RAY_AUTH_TOKEN={'0123456789abcdef' * 3}"):
        unknown = slurm.ray(slurm.nodes[1], *status, setting=stranger)
        assert unknown.returncode != 0
        assert "Total Usage" not in unknown.stdout


def test_two_jobs_side_by_side_both_finish_and_leave_nothing(slurm, two_jobs):
    for job, sweep in zip(two_jobs, (SEQUENTIAL, digits.frozen), strict=True):
        assert job.ends() == ("COMPLETED", "0:0"), job.output()
        outcomes = [trial.outcome for trial in records(slurm, job.place, sweep)]
        assert outcomes == [Outcome.FINISHED] * 2
        statuses, artifacts = in_mlflow(slurm, job.place, sweep)
        assert statuses == dict.fromkeys((sweep.name, f"{sweep.name}-0000", f"{sweep.name}-0001"), "FINISHED")
        assert all(uri.startswith(f"file://{SHARED}/{job.place}/mlflow-artifacts/") for uri in artifacts)
        shown = slurm.login.run(ENVIRONMENT / "bin" / "sweeps", "status", SHARED / job.place / sweep.name)
        assert "2 finished" in shown
    nothing_is_left(slurm.nodes)


@pytest.mark.slow
def test_a_sweep_that_outlives_its_time_goes_on_elsewhere_and_ends_as_if_undisturbed(slurm, two_jobs):
    """Slurm's own warning; the first node is then kept from the job, so that another one is its head."""
    job = slurm.submit("limit", "sweeps/digits.py", *LONG, nodes=1)
    job.wait_for("task 2")
    # The warning comes within half a minute, which a fast machine would need for the whole sweep: the trial is held up.
    until(lambda: signal_trial(slurm.nodes[0], "STOP"))
    slurm.control("update", f"JobId={job.number}", "TimeLimit=6")  # the warning is due five minutes before
    job.wait_for("is interrupted")
    signal_trial(slurm.nodes[0], "CONT")
    slurm.control("update", "NodeName=machine1", "State=DRAIN", "Reason=test")
    try:
        slurm.control("update", f"JobId={job.number}", "TimeLimit=60")
        ends_as_if_undisturbed(slurm, job, two_jobs[0])
    finally:
        slurm.control("update", "NodeName=machine1", "State=RESUME")
    assert job.starts() == [("1", "machine1"), ("2", "machine2")]
    assert "the study is the one kept in" in job.output()
    nothing_is_left(slurm.nodes)


@pytest.mark.slow
def test_a_sweep_outlives_the_node_that_runs_its_job(slurm, two_jobs):
    """With it the job's script is lost, and whoever could have put it back into the queue."""
    job = slurm.submit("first", "sweeps/digits.py", *LONG)
    job.wait_for("task 2")
    first, *others = slurm.nodes_of(job)
    first.end()
    ends_as_if_undisturbed(slurm, job, two_jobs[0])
    assert [start for start, _ in job.starts()] == ["1", "2"]
    nothing_is_left(others)


@pytest.mark.slow
def test_a_sweep_outlives_another_node(slurm, two_jobs):
    job = slurm.submit("lost", "sweeps/digits.py", *LONG)
    job.wait_for("start 1")
    _, lost = slurm.nodes_of(job)
    until(lambda: TRIAL in lost.run("ps", "-eo", "args"), patience_s=300)
    lost.end()
    ends_as_if_undisturbed(slurm, job, two_jobs[0])
    assert [start for start, _ in job.starts()] == ["1"]
    assert slurm.type("sinfo", "--noheader", f"--nodes={lost.name}", "--format=%T").stdout.strip("*\n") == "down"
