"""What the driver sees of its trials and machines between Tune's steps, by a clock of its own."""

from types import SimpleNamespace

import pytest
from ray.core.generated import gcs_pb2

from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.run import actors, watch
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
        self.waiting, self.killed = [], []
        monkeypatch.setattr(watch, "waiting_for_room", lambda actors: [each for each in actors if each in self.waiting])
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


def test_a_hung_trial_is_started_again_while_another_waits_for_room_which_has_all_its_time_when_it_gets_it(
    ledger, cluster, clock
):
    dog, trials = Watchdog(ledger, print), [running(ledger), running(ledger)]
    hangs, waits = (trial.temporary_state.ray_actor for trial in trials)
    cluster.waiting = [waits]
    for _ in range(2):
        dog.look(trials)
        clock.now_s += SILENT_FIRST_S + 1
    dog.look(trials)
    assert set(cluster.killed) == {hangs}
    cluster.waiting = []
    clock.now_s += SILENT_FIRST_S
    dog.look(trials)
    assert set(cluster.killed) == {hangs}
    clock.now_s += 1
    dog.look(trials)
    assert set(cluster.killed) == {hangs, waits}


def test_a_trial_waits_for_room_whose_controller_has_made_a_group_that_waits(monkeypatch):
    """Ray's table of actors names the process that made one; the group for a trial itself is the driver's."""
    hosts = [{"IPAddress": "10.0.0.1", "Port": port} for port in range(2)]
    table = {f"{number:02x}" * 16: {"Address": host} for number, host in enumerate(hosts)}
    table["cc" * 16] = {"Address": {"IPAddress": "10.0.0.1", "Port": 7}, "OwnerAddress": hosts[1]}
    monkeypatch.setattr(actors, "actor_table", table.__getitem__)
    trials = [SimpleNamespace(_actor_id=bytes.fromhex(key)) for key in list(table)[:2]]
    pending = gcs_pb2.PlacementGroupTableData.PENDING
    for maker, waiting in ((0xCC, trials[1:]), (0xFF, [])):
        made = gcs_pb2.PlacementGroupTableData(creator_actor_id=bytes([maker] * 16), state=pending)
        monkeypatch.setattr(actors, "_groups", lambda made=made: [made])
        assert actors.waiting_for_room(trials) == waiting
