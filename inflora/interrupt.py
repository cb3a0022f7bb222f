"""Ctrl-C outside any command, in one line: imported first, it is heard while the other imports take their seconds."""

import signal
import sys
import threading
from types import TracebackType

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


sys.excepthook, sys.unraisablehook = _interrupted_outside, _interrupted_unheard
