"""Waiting for what may never answer."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class NoAnswerError(Exception):
    """It took too long; the message says how long was waited."""


def within(seconds: float, ask: Callable[[], T]) -> T:
    """The answer of ``ask``, which is left to itself, in a thread that ends with the program, when it takes longer.

    Raises:
        NoAnswerError: It has not returned in time.
        Exception: As ``ask`` raises it.
    """
    answers: list[T] = []
    failures: list[Exception] = []

    def run() -> None:
        try:
            answers.append(ask())
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise NoAnswerError(f"does not answer within {seconds:.0f} seconds")
    for error in failures:
        raise error
    return answers[0]
