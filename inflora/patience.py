"""Waiting for what may never answer, and for what will answer again."""

import threading
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

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


def patiently(seconds: float, do: Callable[[], T], warn: Callable[[str], object]) -> T:
    """The answer of ``do``, which is tried again for so many seconds while it raises OSError, as storage that is away.

    ``warn`` is told why, once.

    Raises:
        OSError: The last one.
    """

    def before_sleep(state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            warn(f"{state.outcome.exception()}; trying for {seconds / 60:.0f} minutes")

    retry = Retrying(
        retry=retry_if_exception_type(OSError),
        wait=wait_exponential(multiplier=0.5, max=15),
        stop=stop_after_delay(seconds),
        before_sleep=before_sleep,
        reraise=True,
    )
    return retry(do)
