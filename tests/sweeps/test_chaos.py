"""Whatever a sweep lives on is killed while it runs, and what it leaves is what an undisturbed sweep leaves.

A head and a node that both train, a real MLflow server, and the driver as a user starts it. Each seed draws at which
moments a worker, the driver, the node's raylet and the server are killed; the driver and the server are started again,
the node is replaced or not. Ray Train runs the trials where the seed is even, Tune alone where it is odd.
"""

import contextlib
import heapq
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import optuna
import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from ray.cluster_utils import Cluster as Nodes

from sweeps.engine.ledger.records import Outcome, TrialRecord
from sweeps.engine.ledger.study import study_url
from sweeps.engine.run.preflight import TRIALS
from sweeps.engine.space.spec import Sweep

from .conftest import Recipe
from .server import Server, free_port

pytestmark = pytest.mark.cluster

SEEDS = range(20)
QUICK = 19
"""The one that is not slow."""

KILLED_WITHIN_S = {"train": 40.0, "inline": 20.0}
"""The first moments of a sweep, in which all four kills fall; it lasts longer."""

AWAY_S = 10.0
"""How long a server, or a node that is replaced, is away at most."""

LEARNING = ("RayTrainWorker", "TrainController", "ImplicitFunc")
"""The processes that a trial consists of, by what Ray calls them."""


@pytest.fixture(scope="module")
def sweep(tiny_sweep) -> Sweep:
    """Proposals of chance and no early stopping: neither hangs on which trial ends first."""
    return tiny_sweep.model_copy(
        update={
            "base": tiny_sweep.config({"backbone": {"name": "glyph_vit"}, "optim.epochs": 3}),
            "sampler": "random",
            "early_stopping": "none",
            "trials": 4,
        }
    )


class Left(NamedTuple):
    """What is there when a sweep has ended: the study's trials, MLflow's runs, the states kept; without any times."""

    trials: list[dict[str, Any]]
    runs: list[dict[str, Any]]
    states: list[str]


def what_is_left(recipe: Recipe, uri: str) -> Left:
    study = optuna.load_study(study_name=recipe.sweep.study_name, storage=study_url(recipe.results))
    states = [trial.state.name for trial in study.get_trials()]
    client = MlflowClient(uri)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return Left(
        [without_times(record) | {"state": state} for record, state in zip(recipe.records(), states, strict=True)],
        sorted((shown(client, run) for run in runs), key=lambda run: run["trial"]),
        sorted(folder.name for folder in (recipe.results / TRIALS).iterdir()),
    )


def without_times(record: TrialRecord) -> dict[str, Any]:
    reports = [report.model_dump(exclude={"seconds", "time_ms"}) for report in record.reports]
    names = ("number", "settings", "outcome", "value", "values", "reason", "broken")
    return {name: getattr(record, name) for name in names} | {"reports": reports}


def shown(client: MlflowClient, run: Run) -> dict[str, Any]:
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    points = {name: [(point.step, point.value) for point in history] for name, history in histories.items()}
    if "seconds" in points:
        points["seconds"] = [step for step, _ in points["seconds"]]
    return {
        "trial": int(run.data.tags.get("inflora.trial", -1)),
        "outcome": run.data.tags.get("inflora.outcome"),
        "best": run.data.tags.get("inflora.best_trial"),
        "status": run.info.status,
        "params": run.data.params,
        "metrics": points,
        "artifacts": sorted(artifact.path for artifact in client.list_artifacts(run.info.run_id)),
    }


@pytest.fixture(scope="module")
def undisturbed(sweep, data_root, tmp_path_factory) -> Left:
    """The same sweep on its own Ray, with nothing in its way."""
    recipe = Recipe(tmp_path_factory.mktemp("undisturbed"), sweep, data_root)
    recipe.run("--executor", "inline")
    left = what_is_left(recipe, f"sqlite:///{recipe.results / 'mlflow.db'}")
    assert [run["status"] for run in left.runs] == ["FINISHED"] * (1 + sweep.trials)
    assert [trial["outcome"] for trial in left.trials] == [Outcome.FINISHED] * sweep.trials
    return left


class World:
    """What a sweep lives on: a head and a node that train, an MLflow server, and the sweep's driver."""

    def __init__(self, recipe: Recipe, executor: str) -> None:
        self.recipe, self.folder, self.port = recipe, recipe.folder, free_port()
        self.server = Server(self.folder, self.port)
        self.nodes = Nodes()
        self.nodes.add_node(num_cpus=1, resources={"trial_driver": 2}, include_dashboard=True, dashboard_port=None)
        self.node = self.nodes.add_node(num_cpus=1)
        self.server.ready()
        self.arguments = ("--executor", executor, "--address", self.nodes.address, "--tracking-uri", self.server.uri)
        self.orphans: list[psutil.Process] = []
        self.driver = self.start_driver()

    def start_driver(self) -> subprocess.Popen:
        return self.recipe.start(*self.arguments)

    def kill_driver(self) -> None:
        self.driver.kill()
        self.driver.wait()
        self.driver = self.start_driver()

    def kill_worker(self, rng: random.Random) -> None:
        """One of the processes of one of the trials."""
        with contextlib.suppress(psutil.NoSuchProcess):
            rng.choice(self.learning()).kill()

    def kill_node(self) -> None:
        raylet = self.node.all_processes["raylet"][0].process
        self.orphans += psutil.Process(raylet.pid).children(recursive=True)
        raylet.kill()
        raylet.wait()

    def replace_node(self) -> None:
        self.node = self.nodes.add_node(num_cpus=1)

    def restart_server(self) -> None:
        self.server = Server(self.folder, self.port)

    def learning(self) -> list[psutil.Process]:
        """All processes of trials, those too whose raylet is dead."""
        found = {*psutil.Process().children(recursive=True), *self.orphans}
        return sorted((process for process in found if is_learning(process)), key=lambda process: process.pid)

    def end(self) -> None:
        self.driver.kill()
        self.driver.wait()
        self.nodes.shutdown()
        with contextlib.suppress(ProcessLookupError):
            self.server.kill()


def is_learning(process: psutil.Process) -> bool:
    try:
        return any(name in " ".join(process.cmdline()) for name in LEARNING)
    except psutil.Error:
        return False


def plan(world: World, within_s: float, rng: random.Random) -> list[tuple[float, str, Callable[[], None]]]:
    """What happens at which second."""
    kills = {
        "kill worker": lambda: world.kill_worker(rng),
        "kill driver": world.kill_driver,
        "kill node": world.kill_node,
        "kill server": lambda: world.server.kill(),
    }
    events = [(rng.uniform(0, within_s), name, act) for name, act in kills.items()]
    moments = {name: moment for moment, name, _ in events}
    events.append((moments["kill server"] + rng.uniform(0, AWAY_S), "start server", world.restart_server))
    if rng.random() < 0.5:
        events.append((moments["kill node"] + rng.uniform(0, AWAY_S), "add a node", world.replace_node))
    return sorted(events, key=lambda event: event[0])


@pytest.fixture
def world(sweep, data_root, tmp_path, monkeypatch) -> Iterator[Callable[[str], World]]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with contextlib.ExitStack() as stack:

        def make(executor: str) -> World:
            made = World(Recipe(tmp_path, sweep, data_root), executor)
            stack.callback(made.end)
            return made

        yield make


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [s if s == QUICK else pytest.param(s, marks=pytest.mark.slow) for s in SEEDS])
def test_worker_driver_node_and_server_are_killed_and_the_sweep_ends_as_if_undisturbed(world, undisturbed, seed):
    executor = ("train", "inline")[seed % 2]
    here, rng = world(executor), random.Random(seed)
    recipe, start = here.recipe, time.monotonic()
    events, happened = plan(here, KILLED_WITHIN_S[executor], rng), []
    while events:
        moment, name, act = heapq.heappop(events)
        time.sleep(max(0.0, start + moment - time.monotonic()))
        assert here.driver.poll() is None, f"ended before all was killed: {recipe.log.read_text()}"
        if name == "kill worker" and not here.learning():
            heapq.heappush(events, (moment + 0.5, name, act))  # there is none yet
            continue
        act()
        happened.append(f"{name} {time.monotonic() - start:.1f}")
    assert here.driver.wait(timeout=400) == 0, f"{happened}: {recipe.log.read_text()}"
    here.server.ready()
    print(f"seed {seed} {executor}: {', '.join(happened)}, over {time.monotonic() - start:.1f} s")

    assert what_is_left(recipe, here.server.uri) == undisturbed
    for number in range(recipe.sweep.trials):
        tasks = recipe.learnt(number)
        assert len(tasks) == len(set(tasks)), "no task is learnt twice"

    recipe.run(*here.arguments)
    assert "0 trials to run" in recipe.log.read_text()
    assert what_is_left(recipe, here.server.uri) == undisturbed, "another start finds nothing to do"
    psutil.wait_procs(here.learning(), timeout=30)
    assert not here.learning(), "nothing learns on"
