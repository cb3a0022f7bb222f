"""A sweep is stopped at any moment of its start, again and again, and the same command ends it as if it never was."""

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from itertools import chain
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from sweeps.engine.ledger.records import Outcome
from sweeps.engine.space.spec import Sweep

from .conftest import Recipe, undisturbed

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

FIRST_SECONDS = 5.0
"""Of a start, in which Ctrl-C falls; on a machine with other work all moments come later."""

OUTLIVES = re.compile("RuntimeEnvAgent|DashboardAgent")
"""Ray's two agents of a node stay after a kill; they hold no resources and start nothing."""


class Start:
    """A recipe that has just been started, as if typed into a terminal of its own, with all processes it begets."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.family = recipe, set[psutil.Process]()
        self.said_before = len(recipe.log.read_text()) if recipe.log.exists() else 0
        self.process = recipe.start("--executor", "inline", terminal=True)

    def watch(self, until: Callable[[], Any]) -> Any:
        """Follow it until something is so, and what that is; None where it has ended before."""
        looked = 0.0
        while not (found := until()):
            if self.process.poll() is not None:
                return None
            if time.monotonic() > looked + 0.5:  # it reads all of /proc
                self.family |= set(psutil.Process(self.process.pid).children(recursive=True))
                looked = time.monotonic()
            time.sleep(0.005)
        return found

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def interrupt(self) -> None:
        """Type Ctrl-C: all processes of the terminal hear it."""
        os.killpg(self.process.pid, signal.SIGINT)
        self.process.wait(timeout=60)

    def said(self) -> str:
        return self.recipe.log.read_text()[self.said_before :]

    def left(self) -> list[str]:
        """What still runs of it."""
        _, alive = psutil.wait_procs([each for each in self.family if not OUTLIVES.search(line_of(each))], timeout=30)
        return [line_of(each) for each in alive if line_of(each)]


def line_of(process: psutil.Process) -> str:
    """Its command line; empty once it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture
def recipe(tmp_path, tiny_sweep) -> Recipe:
    """One trial, and nothing there yet: no dataset, no folder."""
    sweep: Sweep = tiny_sweep.model_copy(update={"trials": 1})
    recipe = Recipe(tmp_path, sweep, tmp_path / "data")
    recipe.environment["MLFLOW_TRACKING_URI"] = ""
    return recipe


def kinds_of_files(recipe: Recipe) -> set[str]:
    """What is there, without the names that differ from one start to the next."""
    roots = (recipe.results, recipe.folder / "data")
    walks = [walk for root in roots for walk in os.walk(root)]  # rglob fails at a folder that is just removed
    found = {os.path.relpath(f"{top}/{name}", recipe.folder) for top, *names in walks for name in chain(*names)}
    return {re.sub(r"[0-9a-f]{6,}|\d{3,}|\d\d-\d\d-\d\d|(?<=fn_)\w+|\d+$", "#", path) for path in found}


def assert_as_if_never_stopped(recipe: Recipe) -> None:
    recipe.run("--executor", "inline")
    (record,) = recipe.records()
    assert record.outcome is Outcome.FINISHED
    assert [report.accuracies for report in record.reports] == undisturbed(recipe.sweep, record.settings)
    client = MlflowClient(f"sqlite:///{recipe.results / 'mlflow.db'}")
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"], "the sweep's and its trial's, each once"
    hidden = {path.name for path in recipe.results.iterdir() if path.name.startswith(".")}
    assert hidden == {".lock"}, "nothing half-made lies about"


def kill_when_it_appears(recipe: Recipe, seen: set[str], wanted: str = "") -> set[str] | None:
    """Start it, and kill it at a new kind of file with ``wanted`` in its path; what was new, None if it has ended."""
    start = Start(recipe)
    new = start.watch(lambda: {path for path in kinds_of_files(recipe) - seen if wanted in path})
    if new is None:
        assert start.process.returncode == 0, start.said()
    else:
        start.kill()
    return new


@pytest.mark.slow
def test_a_kill_after_every_file_that_appears(recipe):
    seen: set[str] = set()
    while new := kill_when_it_appears(recipe, seen):
        seen |= new
        print("killed at", ", ".join(sorted(new)))
    assert {"data/digits", "results/tiny/mlflow.db", "results/tiny/study.db", "results/tiny/tune"} <= seen
    assert_as_if_never_stopped(recipe)


def interrupt_after(recipe: Recipe, seconds: float) -> str:
    """Ctrl-C that many seconds after the start of the imports; how it ended, in words."""
    start, began = Start(recipe), time.monotonic()
    start.watch(lambda: time.monotonic() - began > seconds)
    start.interrupt()
    assert "Traceback" not in start.said(), start.said()
    assert start.process.returncode in (130, -signal.SIGINT), start.said()
    assert start.left() == []
    return f"{seconds:.1f} s: {start.process.returncode} {start.said().strip().splitlines()[-1:]}"


@pytest.mark.slow
def test_ctrl_c_at_twenty_moments_of_the_first_seconds(recipe):
    rng = random.Random(13)
    for moment in range(20):
        print(interrupt_after(recipe, rng.uniform(1.0, FIRST_SECONDS)))
        if moment % 3 == 2:
            shutil.rmtree(recipe.results, ignore_errors=True)  # else every start goes on from the one before
    assert_as_if_never_stopped(recipe)


@pytest.mark.slow
def test_kills_while_its_databases_are_made_and_ctrl_c_while_it_starts(recipe):
    assert kill_when_it_appears(recipe, set(), "/.study.db.new")
    assert kill_when_it_appears(recipe, set(), "/.mlflow.db.new")
    for seconds in (1.0, 4.0):
        interrupt_after(recipe, seconds)
    assert_as_if_never_stopped(recipe)
