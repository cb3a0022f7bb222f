"""What the driver sees of its trials and machines between Tune's steps, by a clock of its own."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from grpc import RpcError
from ray.core.generated import gcs_pb2
from ray.exceptions import GetTimeoutError, RaySystemError

from inflora.storage import SharedFolder
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.run import actors, watch
from sweeps.engine.run.watch import (
    ASK_AGAIN_S,
    SILENT_FIRST_S,
    CostWatch,
    NodeWatch,
    StrandedError,
    WaitWatch,
    Watchdog,
)

from .conftest import Anywhere


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


@pytest.mark.parametrize("error", [RpcError, RaySystemError("no"), GetTimeoutError("late")])
@pytest.mark.parametrize("watches", [CostWatch, NodeWatch, WaitWatch, Watchdog])
def test_a_head_that_is_busy_ends_no_sweep(monkeypatch, watches, error):
    looked = []

    def look(self, trials):
        looked.append(self)
        raise error

    monkeypatch.setattr(watches, "look", look)
    watched = watches.__new__(watches)  # whatever it knows
    watched.on_step_begin(0, [])
    assert looked == [watched]


class Machines:
    """Machines that answer what ``answers`` says of them, or nothing yet (None), with a shared place."""

    def __init__(self, monkeypatch, folder):
        self.place, self.answers, self.asked = SharedFolder(str(folder)), {}, []
        monkeypatch.setattr(watch, "other_nodes", lambda: {node: f"10.0.0.{node}" for node in self.answers})
        monkeypatch.setattr(watch, "ask", self._ask)
        monkeypatch.setattr(watch.ray, "wait", self._answered)
        monkeypatch.setattr(watch, "problem_of", lambda node, answer, patience_s: self.answers[node])

    def _answered(self, asked, timeout):
        return [node for node in asked if self.answers[node] is not None], []

    def _ask(self, node, address, mark, likeness):
        assert self.place.read(mark) == b""
        self.asked.append(node)
        return node

    @property
    def marks(self):
        return len(self.place.files(""))


@pytest.fixture
def machines(monkeypatch, tmp_path):
    return Machines(monkeypatch, tmp_path / "shared")


@pytest.fixture
def watched(machines, ledger, said):
    return NodeWatch(ledger, machines.place, Anywhere.likeness, said.append)


@pytest.fixture
def said():
    return []


def test_a_machine_that_is_left_out_is_asked_again_after_a_while(machines, watched, clock, said):
    machines.answers = {"1": "does not see /shared", "2": ""}
    for _ in range(3):
        watched.look([])
    assert (sorted(machines.asked), machines.marks) == (["1", "2"], 0)
    assert said == ["node 10.0.0.1 is left out: does not see /shared"]
    machines.answers["1"] = ""  # the folder is mounted
    clock.now_s += ASK_AGAIN_S - 1
    watched.look([])
    assert len(said) == 1 and set(watched._left_out()) == {"1"}
    clock.now_s += 1
    watched.look([])
    assert machines.asked[2:] == ["1"]
    assert said[1:] == ["node 10.0.0.1 is left out no more"] and not watched._left_out()
    clock.now_s += ASK_AGAIN_S
    watched.look([])
    assert (len(machines.asked), machines.marks) == (3, 0)


def test_a_machine_that_stays_as_it_is_stays_left_out_without_another_word(machines, watched, clock, said):
    machines.answers = {"1": "has inflora-sweeps 0.1.0, the driver 0.2.0"}
    for _ in range(5):
        watched.look([])
        clock.now_s += ASK_AGAIN_S
    assert len(machines.asked) == 5 and len(said) == 1 and set(watched._left_out()) == {"1"}


def test_a_machine_that_does_not_answer_leaves_no_file_behind_and_is_heard_when_it_does(machines, watched, clock, said):
    machines.answers = {"1": None}
    watched.look([])
    machines.answers["2"] = None
    clock.now_s += ASK_AGAIN_S - 1
    watched.look([])
    assert machines.marks == 2
    clock.now_s += 1
    watched.look([])
    assert machines.marks == 1, "a machine that came later still has its time"
    clock.now_s += ASK_AGAIN_S
    watched.look([])
    assert (machines.asked, machines.marks, said) == (["1", "2"], 0, [])
    machines.answers["1"] = "does not see /shared"
    watched.look([])
    watched.look([])
    assert machines.asked == ["1", "2", "1"]


def test_a_place_that_is_away_costs_the_machines_no_question(machines, watched, said):
    machines.answers = {"1": ""}
    away = Path(machines.place.address)
    away.write_text("")
    watched.look([])
    assert machines.asked == []
    away.unlink()
    watched.look([])
    assert (machines.asked, machines.marks, said) == (["1"], 0, [])


def waiting(number, avoid):
    """A trial as Tune has it that waits for a machine."""
    return SimpleNamespace(status="PENDING", config={"number": number, "avoid": avoid})


@pytest.fixture
def alive(machines, monkeypatch):
    """Machines that live; no others come."""
    resources = {"CPU": 1.0}
    nodes: list[str] = []
    monkeypatch.setattr(
        watch.ray, "nodes", lambda: [{"NodeID": n, "Alive": True, "Resources": resources} for n in nodes]
    )
    monkeypatch.setattr(watch.ray, "cluster_resources", lambda: resources)
    return nodes


def test_trials_that_wait_for_a_machine_that_is_no_more_are_placed_anew_when_nothing_else_runs(watched, alive):
    alive += ["full", "left"]
    trials = [waiting(0, ["full"]), waiting(1, [])]
    watched.look(trials)
    alive.remove("left")
    watched.look([*trials, SimpleNamespace(status="RUNNING", config={"number": 2, "avoid": []})])
    with pytest.raises(StrandedError, match="trial 0 waits for a machine other than those that are left"):
        watched.look(trials)
    alive.remove("full")
    watched.look(trials)


def test_where_machines_come_as_they_are_wanted_a_trial_waits_for_one(watched, alive, monkeypatch):
    alive.append("full")
    monkeypatch.setattr(watch, "may_grow", lambda: True)
    watched.look([waiting(0, ["full"])])
