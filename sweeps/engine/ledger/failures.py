"""Kinds of failures, and the change with which trying again can help, if any can."""

import re
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple


class Failure(StrEnum):
    """Kinds of failures, by what helps against them."""

    HOPELESS = "hopeless"  # the same settings give the same end: a loss that is not a number, a setting refused
    NODE = "node"  # a machine is not as the driver's is: another machine helps
    GPU_MEMORY = "gpu memory"  # a GPU was full: more of it can help
    HOST_MEMORY = "host memory"  # a machine was full: others' processes may have been it
    LOST = "lost"  # a process or machine went away: trying again helps
    UNKNOWN = "unknown"  # anything else: tried once more, as it may have been chance


MEMORY_PAUSE_S = 15.0
"""The first pause of a trial after a machine was full; every further one is twice as long."""

LONGEST_PAUSE_S = 60.0


class Tried(NamedTuple):
    """A failed try: the reason, and the number of tasks that were done by then."""

    reason: str
    tasks_done: int


class NodeFault(RuntimeError):
    """A machine's own fault: with another one, the same trial may well go on."""

    def __init__(self, address: str, node_id: str, reason: str) -> None:
        super().__init__(address, node_id, reason)  # as they came: so it is pickled from one process to another

    def __str__(self) -> str:
        return "on node {} (ID: {}): {}".format(*self.args)


# The first that fits. Ray's word for a full machine is the one that PyTorch has for a full GPU.
_SIGNS = (
    (Failure.NODE, r"NodeFault"),
    (Failure.HOPELESS, r"FloatingPointError|ConfigError|DataError|StateError"),
    (Failure.HOST_MEMORY, r"\bMemoryError|low on memory|exceptions\.OutOfMemoryError"),
    (Failure.GPU_MEMORY, r"OutOfMemoryError|out of memory"),
    (
        Failure.LOST,
        r"ActorDiedError|ActorUnavailableError|RayActorError|WorkerCrashedError|NodeDiedError|OwnerDiedError"
        r"|[Tt]he actor .*(died|dead|unavailable)"
        r"|ObjectLostError|PreemptionError|WorkerHealthCheck|SIGKILL|SIGTERM|Connection (refused|reset)",
    ),
)
_IS_FULL = r"killed due to the node running low on memory"
_WHERE = r"\bID: ([0-9a-f]{16,})"
"""The node in a NodeFault's text, and in Ray's about a full machine."""

_VARIES = r"\b[0-9a-f]{8,}\b(?!\.\d)|-?\d[\d.e+-]*"
"""IDs of nodes and actors, which are hexadecimal; addresses and all other numbers."""

# An actor's death is told without an error's name where Ray tells it of a trial's own actor.
_NAMES_ERROR = r"(\w+\.)*\w*(Error|Exception|Interrupt|Exit|Fault)\b|The actor .*(died|dead|unavailable)"


def kind_of(reason: str) -> Failure:
    """The kind of failure that an error's text tells of."""
    return next((kind for kind, signs in _SIGNS if re.search(signs, reason)), Failure.UNKNOWN)


def node_of(reason: str) -> str | None:
    """The ID of the node whose fault a failure was; None where it was no node's."""
    found = re.search(_WHERE, reason) if kind_of(reason) in (Failure.NODE, Failure.HOST_MEMORY) else None
    return found and found[1]


def change_for(failed: Sequence[Tried], retries: int, gpus_per_worker: float) -> str | None:
    """The change with which a trial that failed in these ways is tried again; None: not any more.

    Tries since the last finished task count: a trial that gets on, loss after loss, ends some day. And those of one
    kind: a machine that was lost, one that was full and a place that was away are three accidents, and no fault of the
    trial's. Running out of a GPU's memory is deterministic where a trial has its GPUs to itself; where it shares one, a
    GPU of its own may be enough. A machine may be full of others' processes. An unknown error is given one more try.
    """
    kind, reasons = kind_of(failed[-1].reason), alike_in_vain(failed)
    is_first = len(reasons) == 1
    if kind is Failure.HOPELESS or len(reasons) > retries:
        return None
    if kind is Failure.GPU_MEMORY and gpus_per_worker:
        return "with a GPU of its own" if gpus_per_worker < 1 and is_first else None
    if kind is Failure.NODE:
        # The same node again: there is no other.
        return "elsewhere" if is_first or node_of(reasons[-2]) != node_of(reasons[-1]) else None
    if kind is Failure.UNKNOWN and not is_first:
        return None
    is_memory = kind in (Failure.GPU_MEMORY, Failure.HOST_MEMORY)
    return "when there may be more memory" if is_memory else "from its last finished task"


def pause_before(failed: Sequence[Tried], tasks_done: int) -> float:
    """The seconds for which a trial, ``tasks_done`` tasks in, holds its room and waits before it learns again.

    Where a machine was full, others on it may end meanwhile, and nothing else takes the trial's place.
    """
    if not failed or failed[-1].tasks_done < tasks_done or kind_of(failed[-1].reason) is not Failure.HOST_MEMORY:
        return 0.0
    return min(MEMORY_PAUSE_S * 2.0 ** (len(alike_in_vain(failed)) - 1), LONGEST_PAUSE_S)


def alike_in_vain(failed: Sequence[Tried]) -> list[str]:
    """The reasons of the last tries that have not finished a task and failed as the last one has, in kind."""
    last = failed[-1]
    in_vain = [each.reason for each in failed if each.tasks_done == last.tasks_done]
    return [reason for reason in in_vain if kind_of(reason) is kind_of(last.reason)]


def alike(reasons: Sequence[str]) -> bool:
    """True if failures have one reason, whatever the numbers and IDs in their texts are."""
    return len({re.sub(_VARIES, "#", reason) for reason in reasons}) == 1


def headline(text: str) -> str:
    """The line of a traceback that says what happened: the last that names an error, or the last at all.

    Of a machine that was full Ray tells in the first of many lines, of which the last ones are advice.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    full = [line for line in lines if re.search(_IS_FULL, line)]
    named = [line for line in lines if re.match(_NAMES_ERROR, line)]
    return (full or named or lines or ["unknown error"])[-1][:500]
