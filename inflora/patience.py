"""Waiting for what may never answer, and for what will answer again."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_LONGEST_PAUSE_S = 15.0


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


def patiently(seconds: float, do: Callable[[], T], warn: Callable[[str], object]) -> T:
    """The answer of ``do``, which is tried again for so many seconds while it raises OSError, as storage that is away.

    The seconds count from the first failure in a row; what has worked for longer than them begins a new one. ``warn``
    is told why, once a row.

    Raises:
        OSError: The last one.
    """
    first, pause = None, 0.5
    while True:
        start = time.monotonic()
        try:
            return do()
        except OSError as error:
            now = time.monotonic()
            if first is None or now - start > seconds:
                first, pause = now, 0.5
                if seconds:
                    warn(f"{error}; trying for {seconds / 60:.0f} minutes")
            if now - first >= seconds:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)
