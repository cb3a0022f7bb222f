"""Sweeps on real Ray clusters on this machine: real trials, real worker processes, real kills."""

import os

import psutil
import pytest
import ray
from mlflow import MlflowClient
from ray.cluster_utils import Cluster as Nodes

from inflora.config import ConfigError
from sweeps.engine.ledger.failures import Failure, kind_of
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.records import Outcome
from sweeps.engine.run.cluster import connect, slots
from sweeps.engine.run.runner import locked, run_sweep
from sweeps.engine.run.tune import run_trials
from sweeps.engine.space.domains import Real
from sweeps.engine.space.spec import Resources, read_sweep

from .conftest import PAPER, Recipe, any_node, sqlite, undisturbed

pytestmark = pytest.mark.cluster


@pytest.fixture
def local_cluster(data_root, monkeypatch):
    """A Ray cluster of chosen size, in this process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def start(**resources):
        ray.init(address="local", log_to_driver=False, logging_level="ERROR", **resources)

    yield start
    ray.shutdown()


def assert_every_finished_trial_is_undisturbed(sweep, records):
    finished = [record for record in records if record.outcome is Outcome.FINISHED]
    assert finished
    for record in finished:
        assert [report.accuracies for report in record.reports] == undisturbed(sweep, record.settings)


def statuses_in_mlflow(folder):
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return sorted((int(r.data.tags.get("inflora.trial", -1)), r.info.status) for r in runs)


EXPECTED_STATUS = {Outcome.FINISHED: "FINISHED", Outcome.PRUNED: "KILLED", Outcome.FAILED: "FAILED"}


def assert_mlflow_agrees(folder, records):
    trials = [(record.number, EXPECTED_STATUS[record.outcome]) for record in records]
    assert statuses_in_mlflow(folder) == sorted([(-1, "FINISHED"), *trials])


@pytest.mark.parametrize("executor", [pytest.param("inline", marks=pytest.mark.slow), "train"])
def test_a_sweep_ends_with_all_its_trials_two_at_a_time_and_with_the_numbers_of_plain_runs(recipe, executor):
    recipe.run("--executor", executor, "--num-trials", "3")
    records = recipe.records()
    assert len(records) == 3
    assert records[0].settings == PAPER
    assert all(record.outcome in (Outcome.FINISHED, Outcome.PRUNED) for record in records)
    assert_every_finished_trial_is_undisturbed(recipe.sweep, records)
    assert_mlflow_agrees(recipe.results, records)
    started = [record.start_ms for record in records]
    assert started[1] < records[0].end_ms, "the second trial starts beside the first"


@pytest.mark.slow
def test_a_driver_killed_with_its_own_ray_goes_on_where_it_was(recipe):
    driver = recipe.start("--num-trials", "3", "optim.epochs=3")
    recipe.wait_for(r"task 2 ", driver)
    driver.kill()
    driver.wait()
    recipe.sweep = recipe.sweep.model_copy(update={"base": recipe.sweep.config({"optim.epochs": 3})})
    before = {record.number: record for record in recipe.records()}
    assert any(record.reports for record in before.values())

    recipe.run("--num-trials", "3", "optim.epochs=3")
    records = recipe.records()
    assert len(records) == 3
    for record in records:
        if record.number in before:
            assert record.settings == before[record.number].settings
            reported = before[record.number].reports
            assert record.reports[: len(reported)] == reported
            learnt = recipe.learnt(record.number)
            assert len(learnt) == len(set(learnt)), "no task is learnt twice"
    assert_every_finished_trial_is_undisturbed(recipe.sweep, records)
    assert_mlflow_agrees(recipe.results, records)

    recipe.run("--num-trials", "3", "optim.epochs=3")
    assert recipe.records() == records, "a third start finds nothing to do"


@pytest.mark.slow
def test_two_workers_learn_what_one_does(tiny_sweep, local_cluster, tmp_path):
    local_cluster(num_cpus=2)
    sweep = tiny_sweep.model_copy(update={"trials": 1, "resources": Resources(workers=2)})
    (record,) = run_sweep(sweep, tmp_path, sqlite(tmp_path), say=print).records
    assert record.outcome is Outcome.FINISHED
    for ours, alone in zip([r.accuracies for r in record.reports], undisturbed(sweep, PAPER), strict=True):
        assert ours == pytest.approx(alone, abs=0.05)  # an image or two may fall on the other side by rounding


@pytest.mark.slow
def test_gpus_in_name_only_are_shared_in_fractions_and_nothing_asks_for_nccl(tiny_sweep, local_cluster, tmp_path):
    local_cluster(num_cpus=2, num_gpus=1)
    resources = Resources(gpus_per_worker=0.5)
    assert slots(resources) == 2
    sweep = tiny_sweep.model_copy(update={"trials": 2, "resources": resources})
    records = run_sweep(sweep, tmp_path, sqlite(tmp_path), say=print).records
    assert len(records) == 2
    assert_every_finished_trial_is_undisturbed(sweep, records)


def test_a_trial_that_cannot_fit_is_refused_before_it_waits_for_ever(tiny_sweep, local_cluster, tmp_path):
    local_cluster(num_cpus=1)
    with pytest.raises(ValueError, match="a trial needs 1 workers of 8 CPUs and 0 GPUs, the cluster has room for 0"):
        slots(Resources(cpus_per_worker=8))


def test_a_trial_whose_loss_explodes_fails_with_its_reason_and_the_sweep_goes_on(tiny_sweep, local_cluster, tmp_path):
    local_cluster(num_cpus=2)
    hopeless = PAPER | {"optim.lr": 1e30}
    space = tiny_sweep.space | {"optim.lr": tiny_sweep.space["optim.lr"].model_copy(update={"high": 1e30})}
    sweep = tiny_sweep.model_copy(
        update={"trials": 2, "first": (hopeless, PAPER), "space": space, "executor": "inline"}
    )
    records = run_sweep(sweep, tmp_path, sqlite(tmp_path), say=print).records
    assert [record.outcome for record in records] == [Outcome.FAILED, Outcome.FINISHED]
    assert "FloatingPointError" in records[0].reason
    assert_mlflow_agrees(tmp_path, records)


def test_why_a_trial_failed_is_kept_word_for_word(tiny_sweep, local_cluster, tmp_path):
    local_cluster(num_cpus=1)

    def breaks(settings):
        raise KeyError(f"no such thing as {settings['number']}")

    ledger = Ledger(tiny_sweep.model_copy(update={"trials": 1, "executor": "inline"}), tmp_path)
    run_trials(ledger, tmp_path, breaks, 1, print, any_node(ledger, tmp_path))
    (record,) = ledger.records()
    reasons = [each.reason for each in record.tries]
    assert reasons == ["KeyError: 'no such thing as 0'"] * 2, "what is not known is tried once more"
    assert record.reason == reasons[-1]


def test_the_dashboard_listens_on_this_machine_only(local_cluster):
    local_cluster(num_cpus=1)
    port = int(ray.worker.global_worker.node.webui_url.rsplit(":", 1)[1])
    listening = {
        connection.laddr.ip
        for process in psutil.Process().children(recursive=True)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    assert listening == {"127.0.0.1"}


@pytest.fixture(scope="module")
def anothers():
    """The address of a Ray that somebody else has started on this machine."""
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": True})
    yield nodes.address
    nodes.shutdown()


@pytest.mark.parametrize("told", [None, "argument", "environment"])
def test_a_sweep_joins_the_ray_that_it_is_told_of_and_else_starts_its_own(anothers, local_cluster, told, monkeypatch):
    if told == "environment":
        monkeypatch.setenv("RAY_ADDRESS", anothers)
    else:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    said: list[str] = []
    connect(anothers if told == "argument" else None, said.append)
    here = ray.get_runtime_context().gcs_address
    assert (here == anothers) == (told is not None)
    assert said == [f"Ray: joined {anothers} (1 CPU)" if told else f"Ray: started on this machine ({cpus()})"]
    assert os.environ.get("RAY_ADDRESS") == (anothers if told == "environment" else None)


def cpus() -> str:
    count = os.cpu_count() or 1
    return f"{count} CPU{'s' if count > 1 else ''}"


@pytest.mark.slow
def test_two_sweeps_on_one_machine_end_as_if_each_were_alone(tiny_sweep, tmp_path, data_root):
    recipes = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        recipes.append(Recipe(tmp_path / name, tiny_sweep.model_copy(update={"trials": 2}), data_root))
        del recipes[-1].environment["RAY_ADDRESS"]
    drivers = [recipe.start() for recipe in recipes]
    for recipe, driver in zip(recipes, drivers, strict=True):
        assert driver.wait(timeout=280) == 0, recipe.log.read_text()
        assert "Ray: started on this machine" in recipe.log.read_text()
        assert_every_finished_trial_is_undisturbed(recipe.sweep, recipe.records())
        assert_mlflow_agrees(recipe.results, recipe.records())


def test_two_drivers_do_not_run_one_sweep(tiny_sweep, tmp_path):
    with locked(tiny_sweep, tmp_path), pytest.raises(ConfigError, match="is being run by another process"):
        run_sweep(tiny_sweep, tmp_path, sqlite(tmp_path), say=print)


def test_another_base_does_not_take_over_a_sweeps_folder(tiny_sweep, tmp_path):
    with locked(tiny_sweep, tmp_path):
        pass
    other = tiny_sweep.model_copy(update={"base": tiny_sweep.config({"optim.epochs": 7})})
    with pytest.raises(ConfigError, match="holds a sweep with another base or space"):
        run_sweep(other, tmp_path, sqlite(tmp_path), say=print)
    assert read_sweep(tmp_path) == tiny_sweep


@pytest.mark.slow
def test_nothing_learns_on_when_the_driver_is_killed(recipe):
    driver = recipe.start("--num-trials", "1", "optim.epochs=50")
    recipe.wait_for("starts", driver)
    # Ray's two node agents outlive their raylet; they hold no resources and start nothing.
    family = [p for p in psutil.Process(driver.pid).children(recursive=True) if "Agent" not in " ".join(p.cmdline())]
    assert family
    driver.kill()
    driver.wait()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, [p.cmdline() for p in alive]


def test_a_sweep_whose_first_trials_all_fail_alike_stops_with_the_reason_in_one_line(tiny_sweep, tmp_path, data_root):
    hopeless = Real(low=1e29, high=1e30)
    space = tiny_sweep.space | {"optim.lr": hopeless}
    recipe = Recipe(tmp_path, tiny_sweep.model_copy(update={"space": space, "first": (), "trials": 9}), data_root)
    assert recipe.start("--executor", "inline").wait(timeout=280) == 2
    (last,) = [line for line in recipe.log.read_text().splitlines() if line.startswith("error:")]
    assert "the first 3 trials all failed alike: FloatingPointError" in last
    assert len(recipe.records()) <= 5, "at most what ran beside them"


def test_a_trial_whose_actor_dies_is_tried_again_from_its_last_task(tiny_sweep, local_cluster, tmp_path):
    local_cluster(num_cpus=1)
    killed = []

    def kill_once(line):
        if "task 2 " in line and not killed:
            family = psutil.Process().children(recursive=True)
            killed.extend(p for p in family if "ImplicitFunc" in " ".join(p.cmdline()))
            for process in killed:
                process.kill()

    sweep = tiny_sweep.model_copy(
        update={"trials": 1, "executor": "inline", "base": tiny_sweep.config({"optim.epochs": 5})}
    )
    (record,) = run_sweep(sweep, tmp_path, sqlite(tmp_path), say=kill_once).records
    assert killed
    assert record.outcome is Outcome.FINISHED
    assert [kind_of(each.reason) for each in record.tries] == [Failure.LOST], record.tries
    assert_every_finished_trial_is_undisturbed(sweep, [record])
    assert_mlflow_agrees(tmp_path, [record])
