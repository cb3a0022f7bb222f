"""Kinds of failures, and the change with which trying again can help, if any can."""

import re
from collections.abc import Sequence
from enum import StrEnum


class Failure(StrEnum):
    """Kinds of failures, by what helps against them."""

    HOPELESS = "hopeless"  # the same settings give the same end: a loss that is not a number, a setting refused
    MEMORY = "memory"  # a GPU or machine was full: more room can help
    LOST = "lost"  # a process or machine went away: trying again helps
    UNKNOWN = "unknown"  # anything else: tried once more, as it may have been chance


_SIGNS = (
    (Failure.HOPELESS, r"FloatingPointError|ConfigError|DataError|StateError"),
    (Failure.MEMORY, r"OutOfMemoryError|MemoryError|out of memory|running low on memory"),
    (
        Failure.LOST,
        r"ActorDiedError|ActorUnavailableError|RayActorError|WorkerCrashedError|NodeDiedError|OwnerDiedError"
        r"|[Tt]he actor .*(died|dead|unavailable)"
        r"|ObjectLostError|PreemptionError|WorkerHealthCheck|SIGKILL|SIGTERM|Connection (refused|reset)",
    ),
)


# An actor's death is told without an error's name where Ray tells it of a trial's own actor.
_NAMES_ERROR = r"(\w+\.)*\w*(Error|Exception|Interrupt|Exit)\b|The actor .*(died|dead|unavailable)"


def kind_of(reason: str) -> Failure:
    """The kind of failure that an error's text tells of."""
    return next((kind for kind, signs in _SIGNS if re.search(signs, reason)), Failure.UNKNOWN)


def change_for(failed: Sequence[str], retries: int, gpus_per_worker: float) -> str | None:
    """The change with which a trial that failed for these reasons is tried again; None: not any more.

    Running out of memory is deterministic where a trial has its GPUs to itself; where it shares one, a GPU of its own
    may be enough, and on a CPU its neighbours may have taken the memory. An unknown error is given one more try.
    """
    kind, tries = kind_of(failed[-1]), len(failed)
    if kind is Failure.HOPELESS or tries > retries:
        return None
    if kind is Failure.MEMORY:
        if gpus_per_worker >= 1 or (tries > 1 and kind_of(failed[-2]) is Failure.MEMORY):
            return None
        return "with a GPU of its own" if gpus_per_worker else "when there may be more memory"
    if kind is Failure.UNKNOWN and tries > 1:
        return None
    return "from its last finished task"


def alike(reasons: Sequence[str]) -> bool:
    """True if failures have one reason, whatever the numbers in their texts are."""
    return len({re.sub(r"-?\d[\d.e+-]*", "#", reason) for reason in reasons}) == 1


def headline(text: str) -> str:
    """The line of a traceback that says what happened: the last that names an error, or the last at all."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(_NAMES_ERROR, line)]
    return (named or lines or ["unknown error"])[-1][:500]
