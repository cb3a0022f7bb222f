"""Whatever a sweep lives on is killed while it runs, and what it leaves is what an undisturbed sweep leaves.

A head and a node that both train, a shared place, a real MLflow server, and the driver as a user starts it. Each seed
draws at which moments a worker, the driver, the node's raylet and the server are killed, the machine's memory fills up
so that Ray kills what learns, the place is away, and a node comes that has no data. The driver, the server and the
place come back, the node is replaced or not. Ray Train runs the trials where the seed is even, Tune alone where odd.
"""

import contextlib
import heapq
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from ray.cluster_utils import Cluster as Nodes

from sweeps.engine.ledger.database import study_url
from sweeps.engine.ledger.records import Outcome, TrialRecord
from sweeps.engine.run.preflight import TRIALS
from sweeps.engine.space.spec import Sweep

from .conftest import Recipe
from .server import Server, free_port
from .test_away import folder_place

pytestmark = pytest.mark.cluster

SEEDS = range(20)
QUICK = 19
"""The one that is not slow."""

KILLED_WITHIN_S = {"train": 40.0, "inline": 20.0}
"""The first moments of a sweep, in which all of it falls; it lasts longer."""

AWAY_S = 10.0
"""How long a server, the place, or a node that is replaced is away at most."""

DRIVES = {"trial_driver": 1}
"""What a node offers that drives the trial that it trains."""

SPARE_GB, HOG_GB = 7, 8
"""The memory that may still be filled before Ray kills what learns, and what is filled to have it do so.

All that a sweep lives on takes four of it, which the machine must not be short of for longer than the fault.
"""

BESIDE_OTHERS = "PYTEST_XDIST_WORKER" in os.environ
"""Other tests run at the same time, whose memory comes and goes: it is then not filled."""

HOG = "import sys, time; hog = b'x' * int(float(sys.argv[1]) * 2**30); time.sleep(60)"

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


def what_is_left(recipe: Recipe, uri: str, place: Path) -> Left:
    study = optuna.load_study(study_name=recipe.sweep.study_name, storage=study_url(recipe.results))
    states = [trial.state.name for trial in study.get_trials()]
    client = MlflowClient(uri)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return Left(
        [without_times(record) | {"state": state} for record, state in zip(recipe.records(), states, strict=True)],
        sorted((shown(client, run) for run in runs), key=lambda run: run["trial"]),
        sorted(folder.name for folder in (place / TRIALS).iterdir()),
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
    left = what_is_left(recipe, f"sqlite:///{recipe.results / 'mlflow.db'}", recipe.results)
    assert [run["status"] for run in left.runs] == ["FINISHED"] * (1 + sweep.trials)
    assert [trial["outcome"] for trial in left.trials] == [Outcome.FINISHED] * sweep.trials
    return left


class World:
    """What a sweep lives on: a head and a node that train, an MLflow server, and the sweep's driver."""

    def __init__(self, recipe: Recipe, executor: str) -> None:
        self.recipe, self.folder, self.port = recipe, recipe.folder, free_port()
        self.place = folder_place(self.folder)
        self.server = Server(self.folder, self.port)
        self.nodes = Nodes()
        memory = psutil.virtual_memory()
        full = f"{memory.percent / 100 + SPARE_GB * 2**30 / memory.total:.3f}"
        self.full = {} if BESIDE_OTHERS else {"RAY_memory_usage_threshold": full}
        self.add_node()
        self.node = self.add_node()
        self.server.ready()
        self.arguments = (
            *("--executor", executor, "--address", self.nodes.address),
            *("--tracking-uri", self.server.uri, "--shared", self.place.address),
        )
        self.orphans: list[psutil.Process] = []
        self.driver = self.start_driver()

    def add_node(self, **env_vars: str) -> Any:
        return self.nodes.add_node(num_cpus=1, resources=DRIVES, env_vars=self.full | env_vars)

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
        self.node = self.add_node()

    def add_node_without_data(self) -> None:
        (self.folder / "no-data").mkdir()
        self.add_node(INFLORA_DATA=str(self.folder / "no-data"))

    def fill_memory(self) -> None:
        """Until Ray has killed something, or for so long that it would have."""
        before = self.learning()
        hog = subprocess.Popen([sys.executable, "-c", HOG, str(HOG_GB)])
        try:
            deadline = time.monotonic() + 10
            while all(process.is_running() for process in before) and time.monotonic() < deadline:
                time.sleep(0.05)
        finally:
            hog.kill()
            hog.wait()

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
        "fill memory": world.fill_memory,
        "take place away": world.place.take_away,
        "add a node without data": world.add_node_without_data,
    }
    if BESIDE_OTHERS:
        del kills["fill memory"]
    events = [(rng.uniform(0, within_s), name, act) for name, act in kills.items()]
    moments = {name: moment for moment, name, _ in events}
    events.append((moments["kill server"] + rng.uniform(0, AWAY_S), "start server", world.restart_server))
    events.append((moments["take place away"] + rng.uniform(0, AWAY_S), "bring place back", world.place.bring_back))
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
def test_whatever_a_sweep_lives_on_fails_and_it_ends_as_if_undisturbed(world, undisturbed, seed):
    executor = ("train", "inline")[seed % 2]
    here, rng = world(executor), random.Random(seed)
    recipe = here.recipe
    # A sweep that has not begun, on a slow machine perhaps, refuses a server or a place that does not answer.
    recipe.wait_for("trials to run", here.driver)
    start = time.monotonic()
    events, happened = plan(here, KILLED_WITHIN_S[executor], rng), []
    while events:
        moment, name, act = heapq.heappop(events)
        time.sleep(max(0.0, start + moment - time.monotonic()))
        assert here.driver.poll() is None, f"ended before all was killed: {recipe.log.read_text()}"
        if name in ("kill worker", "fill memory") and not here.learning():
            heapq.heappush(events, (moment + 0.5, name, act))  # there is none yet
            continue
        act()
        happened.append(f"{name} {time.monotonic() - start:.1f}")
    assert here.driver.wait(timeout=400) == 0, f"{happened}: {recipe.log.read_text()}"
    here.server.ready()
    print(f"seed {seed} {executor}: {', '.join(happened)}, over {time.monotonic() - start:.1f} s")

    place = Path(here.place.address) / recipe.sweep.name
    assert what_is_left(recipe, here.server.uri, place) == undisturbed
    for number in range(recipe.sweep.trials):
        tasks = recipe.learnt(number)
        assert len(tasks) == len(set(tasks)), "no task is learnt twice"

    recipe.run(*here.arguments)
    assert "0 trials to run" in recipe.log.read_text()
    assert what_is_left(recipe, here.server.uri, place) == undisturbed, "another start finds nothing to do"
    psutil.wait_procs(here.learning(), timeout=30)
    assert not here.learning(), "nothing learns on"
