"""Waiting for what may never answer, and for what will answer again."""

import threading

import pytest

from inflora import patience
from inflora.patience import NoAnswerError, patiently, within


def test_an_answer_and_an_error_come_through():
    assert within(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)


def test_what_does_not_answer_is_left_to_itself():
    never = threading.Event()
    with pytest.raises(NoAnswerError, match="does not answer within 0 seconds"):
        within(0.01, never.wait)
    never.set()


class Storage:
    """Work of so many seconds each time, by a clock of its own; ends by an error until it is done."""

    def __init__(self, monkeypatch, *lasts_s):
        self.now_s, self.lasts_s, self.warned = 50.0, list(lasts_s), []
        monkeypatch.setattr(patience, "time", self)

    def monotonic(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds

    def work(self):
        self.now_s += self.lasts_s.pop(0)
        if self.lasts_s:
            raise OSError("away")
        return "done"


@pytest.mark.parametrize(
    ("lasts_s", "rows"),
    [((5000, 1), 1), ((1, *[15] * 25, 1), 1), ((5000, *[15] * 25, 5000, *[15] * 25, 1), 2)],
    ids=["after long work", "at once", "twice"],
)
def test_what_is_away_is_waited_for_from_its_first_failure_in_a_row(monkeypatch, lasts_s, rows):
    storage = Storage(monkeypatch, *lasts_s)
    assert patiently(900, storage.work, storage.warned.append) == "done"
    assert storage.warned == ["away; trying for 15 minutes"] * rows


@pytest.mark.parametrize("seconds", [900, 0])
def test_what_stays_away_is_given_up(monkeypatch, seconds):
    storage = Storage(monkeypatch, 5000, *[0] * 1000)
    with pytest.raises(OSError, match="away"):
        patiently(seconds, storage.work, storage.warned.append)
    assert 5050 + seconds <= storage.now_s <= 5050 + seconds + 15
    assert len(storage.warned) == (seconds > 0)
