"""One rule for all that is read: an answer, or one line; counted, so that a run of the fuzz tests can say how many."""

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from inflora.errors import UserError

T = TypeVar("T")
LONGEST = 1500

counts: Counter[str] = Counter()
"""Answers and lines of the test that runs."""


class OneLine(str):
    """The line in an answer's place."""


def answered(ask: Callable[[], T]) -> T | OneLine:
    """The answer, or the one line; anything else is the defect that is looked for."""
    try:
        answer = ask()
    except UserError as error:
        line = OneLine(error)
        assert line and line.isprintable() and len(line) < LONGEST
        counts["one line"] += 1
        return line
    counts["answered"] += 1
    return answer
