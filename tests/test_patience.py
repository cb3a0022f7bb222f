"""Waiting for what may never answer."""

import threading

import pytest

from inflora.patience import NoAnswerError, within


def test_an_answer_and_an_error_come_through():
    assert within(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)


def test_what_does_not_answer_is_left_to_itself():
    never = threading.Event()
    with pytest.raises(NoAnswerError, match="does not answer within 0 seconds"):
        within(0.01, never.wait)
    never.set()
