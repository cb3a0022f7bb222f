"""What tests with real processes wait for."""

import time
from collections.abc import Callable


def until(
    true: Callable[[], bool],
    patience_s: float = 60.0,
    every_s: float = 0.1,
    otherwise: Callable[[], str] = lambda: "it never came to be so",
) -> None:
    """Wait until ``true()``; what ``otherwise`` says is the reason of the failure."""
    end = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < end, otherwise()
        time.sleep(every_s)
