"""Two heads on one shared place: the second is refused while the first lives, and takes over when it is dead."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from inflora.config import ConfigError
from inflora.storage import SharedFolder
from sweeps.engine.ledger.database import chosen_url
from sweeps.engine.ledger.lease import (
    LEASE_FILE,
    ReplacedError,
    holder,
    leased,
    require_ours,
    seems_driven,
)
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.run import runner
from sweeps.engine.run.preflight import Ready
from sweeps.engine.run.storage import copy_study

from .conftest import Recipe

HOLD = """
import sys, time
from inflora.storage import SharedFolder
from sweeps.engine.ledger.lease import leased
with leased(SharedFolder(sys.argv[1]), print, renew_s=0.3):
    print("held", flush=True)
    while True:
        time.sleep(0.05)
"""


def wait_until_held(process: subprocess.Popen) -> None:
    assert "held\n" in iter(process.stdout.readline, ""), "it has ended"


@pytest.fixture(params=["folder", "bucket"])
def place(request, tmp_path):
    root = str(tmp_path / "shared") if request.param == "folder" else request.getfixturevalue("bucket")
    return SharedFolder(f"{root}/sweeps/{tmp_path.name}")


@pytest.fixture
def other(place):
    """A driver in a process of its own, which holds the place."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, place.address], stdout=subprocess.PIPE, text=True)
    wait_until_held(process)
    yield process
    process.kill()
    process.wait()


def from_elsewhere(place: SharedFolder, **changes) -> None:
    """The lease in the place, as if its driver were on another machine."""
    held = holder(place)
    place.write(LEASE_FILE, held.model_copy(update={"machine": "another", **changes}).model_dump_json().encode())


def refused(place: SharedFolder, match: str, **times: float) -> list[str]:
    said: list[str] = []
    with pytest.raises(ConfigError, match=match), leased(place, said.append, **times):
        pass
    return said


def test_a_second_driver_is_refused_at_once_where_the_firsts_process_is_seen(place, other):
    start = time.monotonic()
    assert refused(place, rf"is being run by process {other.pid} on \S+$") == []
    assert time.monotonic() - start < 5
    assert seems_driven(place.read(LEASE_FILE))


def test_a_killed_driver_is_replaced_at_once_on_its_own_machine(place, other):
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # dead, and left a zombie
    assert not seems_driven(place.read(LEASE_FILE)), "a zombie drives nothing"
    said: list[str] = []
    start = time.monotonic()
    with leased(place, said.append):
        assert time.monotonic() - start < 5
        require_ours(place)
    assert [line.partition(" on ")[0] for line in said] == [f"process {other.pid}"]
    assert place.read(LEASE_FILE) is None, "it is given back"


def test_a_driver_on_another_machine_is_refused_while_the_lease_is_renewed(place, other):
    """No process can be seen there: the lease is watched."""
    elsewhere = threading.Event()

    def renew() -> None:
        count = 0
        while not elsewhere.wait(0.2):
            from_elsewhere(place, owner="another", renewed_ms=(count := count + 1))

    other.kill()
    thread = threading.Thread(target=renew)
    thread.start()
    time.sleep(0.5)
    said = refused(place, "is being run by process", stale_s=20)
    elsewhere.set()
    thread.join()
    assert len(said) == 1 and "20 seconds to see whether that is alive" in said[0]


def test_a_lease_that_nobody_renews_is_taken_over_whatever_its_clock_says(place, other):
    other.kill()
    other.wait()
    from_elsewhere(place, renewed_ms=int((time.time() + 86400) * 1000))
    said: list[str] = []
    with leased(place, said.append, stale_s=2):
        require_ours(place)
    assert "is gone: its lease of" in said[-1]


@pytest.mark.parametrize("started", ["exec", "trap '' INT; exec"], ids=["by hand", "in a script's background"])
def test_a_driver_that_was_taken_for_dead_hears_that_it_was_replaced_and_does_not_write_over_the_others_study(
    tmp_path, monkeypatch, started
):
    place, head = SharedFolder(str(tmp_path / "shared")), tmp_path / "head"
    command = ["sh", "-c", f'{started} "$@"', "sh", sys.executable, "-c", HOLD, place.address]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    wait_until_held(process)
    process.send_signal(signal.SIGSTOP)  # a machine that sleeps
    from_elsewhere(place)
    with leased(place, print, stale_s=1, renew_s=0.2):
        process.send_signal(signal.SIGCONT)
        said = process.stdout.read()
        assert process.wait(timeout=20) in (1, -signal.SIGINT, -signal.SIGTERM), "as by Ctrl-C"
        assert f"process {os.getpid()} on " in said and "this driver ends" in said
        require_ours(place)  # it has not given back what is not its own
        monkeypatch.setattr("sweeps.engine.ledger.lease._OWNER", "the first driver's")
        with pytest.raises(ReplacedError, match=r"has taken .* over"):
            copy_study(head, place)


def test_a_driver_that_slept_while_another_ended_the_sweep_does_not_write_over_it(place, tmp_path):
    said: list[str] = []

    def drive() -> None:
        with leased(place, said.append, renew_s=0.2):
            place.delete(LEASE_FILE)  # the other has given it back
            with pytest.raises(ReplacedError, match="another driver has had"):
                copy_study(tmp_path / "head", place)
            time.sleep(20)

    with pytest.raises(KeyboardInterrupt):
        drive()
    assert "this driver ends" in said[-1]
    assert place.read(LEASE_FILE) is None


@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_driver_that_was_replaced_leaves_mlflow_to_the_other(tiny_sweep, tmp_path, monkeypatch, is_replaced):
    place, head, delivered = SharedFolder(str(tmp_path / "shared")), tmp_path / "head", []

    class Deliveries:
        def __init__(self, *_):
            self.start = lambda: None

        def close(self, **told):
            delivered.append(told)
            return True

    def learn(*_):
        if is_replaced:
            from_elsewhere(place, owner="another")

    monkeypatch.setattr(runner, "Tracker", Deliveries)
    monkeypatch.setattr(runner, "_start_trials", learn)
    monkeypatch.setattr(runner, "doubts", lambda *_: [])
    monkeypatch.setattr(runner, "check_nodes", lambda place: None)
    with leased(place, print), runner.locked(tiny_sweep, head):
        ready = Ready(chosen_url(head, None), place, 0, 1, {}, [], 100)
        result = runner._run_what_is_left(Ledger(tiny_sweep, head), head, ready, "sqlite://", print)
    assert (result.delivered, len(delivered)) == ((False, 0) if is_replaced else (True, 1))


def test_a_lease_is_kept_while_the_place_is_away(tmp_path, caplog):
    folder = tmp_path / "shared"
    place = SharedFolder(str(folder))
    with leased(place, print, renew_s=0.1):
        folder.rename(tmp_path / "away")
        time.sleep(1)
        assert not folder.exists(), "a folder that is not there is not made anew"
        (tmp_path / "away").rename(folder)
        before = holder(place)
        time.sleep(1)
        assert holder(place).renewed_ms > before.renewed_ms
    assert len([line for line in caplog.messages if "is away" in line]) == 1


def test_of_two_that_begin_at_one_moment_one_is_refused(tmp_path):
    place = SharedFolder(str(tmp_path))
    answers = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, place.address], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    deadline = time.monotonic() + 60
    while all(process.poll() is None for process in answers) and time.monotonic() < deadline:
        time.sleep(0.1)
    alive = [process for process in answers if process.poll() is None]
    ended = [process for process in answers if process.poll() is not None]
    for process in alive:
        process.kill()
    assert (len(alive), len(ended)) == (1, 1)
    assert "is being run by process" in ended[0].stdout.read()


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[" * 100_000, b'{"owner": 1}'])
def test_a_file_that_no_driver_has_written_holds_nothing(tmp_path, content):
    place = SharedFolder(str(tmp_path))
    place.write(LEASE_FILE, content)
    assert not seems_driven(content)
    with leased(place, print):
        assert holder(place).pid == os.getpid()


@pytest.mark.slow
@pytest.mark.cluster
def test_a_second_head_on_the_same_place_is_refused_in_a_line_and_a_killed_one_is_replaced(
    tiny_sweep, tmp_path, data_root
):
    sweep = tiny_sweep.model_copy(update={"trials": 1, "base": tiny_sweep.config({"optim.epochs": 300})})
    shared = ("--shared", str(tmp_path / "shared"), "--executor", "inline")
    heads = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        heads.append(Recipe(tmp_path / name, sweep, data_root))
    first = heads[0].start(*shared)
    try:
        heads[0].wait_for("starts", first)
        second = heads[1].start(*shared)
        assert second.wait(timeout=120) == 2
        (error,) = [line for line in heads[1].log.read_text().splitlines() if line.startswith("error:")]
        assert error.startswith(f"error: the sweep in {tmp_path}/shared/tiny is being run by process {first.pid} on ")
        assert not (heads[1].results / "study.db").exists(), "nothing of it was begun"
    finally:
        first.kill()
        first.wait()
    second = heads[1].start(*shared)
    try:
        heads[1].wait_for("the study is the one kept in", second)
        assert f"process {first.pid} on" in heads[1].log.read_text()
    finally:
        second.kill()
        second.wait()
