"""Checks one after another, each in a process of its own: what crashes, hangs or spoils a GPU's context harms no other.

The processes are forked from a server that has imported what the checks need and has never touched a GPU, so that
each begins in a fraction of a second.
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

from inflora.config import ConfigError
from inflora.errors import one_line

Device = Literal["cuda", "cpu"]
LIMIT_S = 240.0
"""Seconds that a check may take: a driver or a collective that hangs is a finding too."""


class Bench(NamedTuple):
    """The means of a check: the device, a folder of its own, and one for the stores that checks have in common."""

    device: Device
    folder: Path
    stores: Path


Check = Callable[[Bench], str]
"""Says in a few words what it found, and raises where something is wrong; a module's function, to be pickled."""


class Failed(Exception):
    """A check's finding: the message is the whole reason."""


class NotTried(Exception):
    """There is nothing to check here; the message says why."""


class Verdict(StrEnum):
    """The end of a check."""

    PASSED = "passed"
    FAILED = "FAILED"
    NOT_TRIED = "not tried"


class Outcome(NamedTuple):
    """A check's end: what it found or why it failed, in one line, and all that it printed, tracebacks included."""

    name: str
    verdict: Verdict
    detail: str
    seconds: float
    printed: str


def run_checks(
    checks: Mapping[str, Check], device: Device, folder: Path, limit_s: float = LIMIT_S
) -> Iterator[Outcome]:
    """Run every check, whatever has become of those before it; what they make is left in ``folder``."""
    preload(check.__module__ for check in checks.values())
    for number, (name, check) in enumerate(checks.items()):
        bench = Bench(device, folder / f"{number:02}", folder / "stores")
        bench.folder.mkdir(parents=True)
        output, start = bench.folder / "printed", time.perf_counter()
        try:
            with called(check, bench, output=output) as answer:
                verdict, detail = Verdict.PASSED, answer(limit_s)
        except NotTried as why:
            verdict, detail = Verdict.NOT_TRIED, str(why)
        except Failed as why:
            verdict, detail = Verdict.FAILED, str(why)
        seconds = time.perf_counter() - start
        yield Outcome(name, verdict, detail, seconds, output.read_text(errors="replace"))


def preload(modules: Iterable[str]) -> None:
    """Let the processes that this one starts begin with these modules imported; too late after the first."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(sorted(set(modules)))


@contextmanager
def called(function: Callable[..., Any], *arguments: object, output: Path) -> Iterator[Callable[[float], Any]]:
    """Call ``function`` in a process of its own, which is gone when this is left; what it prints goes to ``output``.

    What is given waits at most so many seconds for the answer. It raises Failed if there is none, and NotTried where
    the function does.
    """
    context = multiprocessing.get_context("forkserver")
    output.touch()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(function, arguments, output, sender))
    process.start()
    sender.close()

    def answer(limit_s: float) -> Any:
        if not receiver.poll(limit_s):
            raise Failed(f"has not ended after {limit_s:.0f} s")
        try:
            verdict, value = receiver.recv()
        except EOFError:
            process.join()
            raise Failed(f"its process died of {_cause(process.exitcode)}") from None
        process.join(limit_s)  # what it has started may still have to end
        if verdict is Verdict.PASSED:
            return value
        raise (NotTried if verdict is Verdict.NOT_TRIED else Failed)(value)

    try:
        yield answer
    finally:
        process.kill()
        process.join()
        receiver.close()


def _call(function: Callable[..., Any], arguments: tuple[object, ...], output: Path, sender: Connection) -> None:
    """Run one check in a process of its own."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable(2)
    try:
        answer = Verdict.PASSED, function(*arguments)
    except NotTried as why:
        answer = Verdict.NOT_TRIED, str(why)
    except Exception as error:
        traceback.print_exc()
        answer = Verdict.FAILED, reason(error)
    sys.stdout.flush()
    sender.send(answer)


def reason(error: Exception) -> str:
    """An error in one line, with its kind where the message was not written to stand alone."""
    kind = "" if isinstance(error, Failed | ConfigError) else f"{type(error).__name__}: "
    return kind + (one_line(str(error), 300) or "no message")


def _cause(exitcode: int | None) -> str:
    return signal.Signals(-exitcode).name if exitcode is not None and exitcode < 0 else f"exit code {exitcode}"
