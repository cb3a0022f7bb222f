"""What the driver sees of its trials and machines between Tune's steps, by a clock of its own."""

from types import SimpleNamespace

import pytest

from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.run import watch
from sweeps.engine.run.watch import SILENT_FIRST_S, Watchdog


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def monotonic(self):
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(watch, "time", clock)
    return clock


@pytest.fixture
def ledger(tiny_sweep, tmp_path):
    return Ledger(tiny_sweep, tmp_path)


class Cluster:
    """What the watchdog asks Ray for."""

    def __init__(self, monkeypatch):
        self.groups, self.killed = [], []
        monkeypatch.setattr(watch, "waiting_groups", lambda: self.groups)
        monkeypatch.setattr(watch, "remove_groups_of_dead_actors", lambda: None)
        monkeypatch.setattr(watch.ray, "kill", self.killed.append)


@pytest.fixture
def cluster(monkeypatch):
    return Cluster(monkeypatch)


def running(ledger):
    """A trial as Tune has it."""
    number = ledger.propose().number
    state = SimpleNamespace(ray_actor=f"actor {number}")
    return SimpleNamespace(trial_id=str(number), status="RUNNING", config={"number": number}, temporary_state=state)


def test_a_trial_that_says_that_it_lives_is_left_alone_however_long_its_task(ledger, cluster, clock):
    dog, trials = Watchdog(ledger, print), [running(ledger), running(ledger)]
    alive, hangs = trials
    dog.look(trials)
    for _ in range(10):
        clock.now_s += SILENT_FIRST_S / 4
        dog.on_trial_result(0, trials, alive, {"acc/seen": 0.0})
        dog.look(trials)
    assert set(cluster.killed) == {hangs.temporary_state.ray_actor}
