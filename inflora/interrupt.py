"""Ctrl-C is one line, also while imports take their seconds: imported first, it is heard outside any command, too."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C has ended: 128 and the number of SIGINT, as a shell says it."""

_excepthook, _unraisablehook = sys.excepthook, sys.unraisablehook


def _interrupted_outside(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C before a command has begun or after it has ended, while a script's own imports take their time."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        _excepthook(kind, error, trace)


def _interrupted_unheard(unraisable: "sys.UnraisableHookArgs") -> None:
    """Ctrl-C in a callback of Python's own, which may not raise (import locks have one): it comes again."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        main = threading.main_thread().ident or 0
        threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()
    else:
        _unraisablehook(unraisable)


@contextmanager
def ctrl_c_ends_imports() -> Iterator[None]:
    """While a command runs, Ctrl-C in an import ends the process at once; anywhere else it is KeyboardInterrupt.

    Some libraries' imports let no exception out, and the command would go on; others, compiled ones, abort at it. To
    what a command keeps this is what a kill is, and every command goes on after one.
    """
    is_main, before = threading.current_thread() is threading.main_thread(), signal.getsignal(signal.SIGINT)
    if not is_main or before is not signal.default_int_handler:  # who ignores it, or hears it already, knows why
        yield
        return
    signal.signal(signal.SIGINT, _interrupted_inside)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupted_inside(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        # Of an import statement alone: who runs a module's code by hand (alembic does) may be doing its work.
        code, frame = frame.f_code, frame.f_back
        if (code.co_filename, code.co_name) == ("<frozen importlib._bootstrap>", "_find_and_load"):
            _end_at_once()
    raise KeyboardInterrupt


def _end_at_once() -> None:
    """End the process with what it has printed, a line and the cursor that a progress bar may have hidden."""
    with suppress(Exception):  # it may just be at it
        sys.stdout.flush()
    os.write(2, b"interrupted\n")
    if os.isatty(2):
        os.write(2, b"\x1b[?25h")
    os._exit(INTERRUPTED)


sys.excepthook, sys.unraisablehook = _interrupted_outside, _interrupted_unheard
