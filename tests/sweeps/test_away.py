"""The shared place is away for a while, as a file system that fails or a bucket that does not answer: time is lost."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest

from sweeps.engine.ledger.records import Outcome
from sweeps.engine.space.spec import Sweep

from .conftest import Recipe, undisturbed

pytestmark = pytest.mark.cluster

AWAY_S = 15.0


class Place(NamedTuple):
    """A shared place that can be taken away."""

    address: str
    take_away: Callable[[], None]
    bring_back: Callable[[], None]


def folder_place(root: Path) -> Place:
    """What asks for anything in it hears an error while a file is in the folder's place."""
    folder, away = root / "shared", root / "away"
    folder.mkdir()

    def take_away() -> None:
        folder.rename(away)
        folder.write_text("")

    def bring_back() -> None:
        folder.unlink()
        away.rename(folder)

    return Place(str(folder), take_away, bring_back)


class Line(threading.Thread):
    """The line to a server, which can be cut: nothing gets through, nobody answers a new call."""

    def __init__(self, to: tuple[str, int]) -> None:
        super().__init__(daemon=True)
        self.to, self.open = to, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()

    def run(self) -> None:
        with contextlib.suppress(OSError):  # it is cut
            while True:
                caller, _ = self.listener.accept()
                server = socket.create_connection(self.to)
                self.open += [caller, server]
                for source, sink in ((caller, server), (server, caller)):
                    threading.Thread(target=forward, args=(source, sink), daemon=True).start()

    def cut(self) -> None:
        for end in (self.listener, *self.open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def mend(self) -> None:
        threading.Thread.__init__(self, daemon=True)
        self.open, self.listener = [], socket.create_server(self.address)
        self.start()


def forward(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(65536):
            sink.sendall(part)
        sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def bucket_place(bucket, monkeypatch) -> Place:
    server = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    line = Line((server.hostname, server.port))
    line.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*line.address))
    return Place(f"{bucket}/sweeps", line.cut, line.mend)


@pytest.fixture
def away_sweep(tiny_sweep) -> Sweep:
    changes = {
        "early_stopping": "none",
        "sampler": "random",
        "trials": 2,
        "base": tiny_sweep.config({"optim.epochs": 3}),
    }
    return tiny_sweep.model_copy(update=changes)


@pytest.mark.slow  # a seed of test_chaos.py does it to inline trials, too
@pytest.mark.parametrize("kind", ["folder", "bucket"])
@pytest.mark.parametrize("executor", ["inline", "train"])
def test_a_place_that_is_away_while_trials_learn_costs_nothing_but_time(
    kind, executor, away_sweep, tmp_path, data_root, request
):
    place = folder_place(tmp_path) if kind == "folder" else request.getfixturevalue("bucket_place")
    recipe = Recipe(tmp_path, away_sweep, data_root)
    driver = recipe.start("--executor", executor, "--shared", place.address)
    recipe.wait_for("task 1", driver)
    place.take_away()
    time.sleep(AWAY_S)
    place.bring_back()
    assert driver.wait(timeout=280) == 0, recipe.log.read_text()
    records = recipe.records()
    assert [record.outcome for record in records] == [Outcome.FINISHED] * 2
    for record in records:
        assert [report.accuracies for report in record.reports] == undisturbed(away_sweep, record.settings)
        assert record.tries == ()
        learnt = recipe.learnt(record.number)
        assert len(learnt) == len(set(learnt)), "no task is learnt twice"
