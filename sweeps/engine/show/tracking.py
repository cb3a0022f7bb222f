"""The process that shows a sweep in MLflow, as its driver sees it."""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel

from inflora.errors import without_password
from sweeps.engine.show.inputs import DataInput
from sweeps.engine.space.spec import Sweep

logger = logging.getLogger(__name__)

DELIVERED, BEHIND = 0, 3
"""The exit codes with which the process says whether MLflow has taken everything; any other is an accident."""

_AGAIN_S = 5.0
_LIMIT_S = 600.0
"""The time beyond its patience that the last delivery may take while it gets on."""


class StartMessage(BaseModel):
    """The first message to the process."""

    sweep: Sweep
    folder: Path
    uri: str
    tags: dict[str, str]
    inputs: list[DataInput] = []
    every_s: float


class CloseMessage(BaseModel):
    """The last message: the sweep is ``complete`` or not, why it is ``over``, and how long to try."""

    complete: bool
    over: str
    patience_s: float


class Tracker(threading.Thread):
    """Has a process keep MLflow up to date until it is closed; a process of its own takes none of the driver's time.

    It ends with the driver, however that ends: its input is the driver's pipe. One that ends before, killed for its
    memory perhaps, is replaced: the study holds what it had to send.
    """

    def __init__(
        self,
        sweep: Sweep,
        folder: Path,
        uri: str,
        tags: Mapping[str, str],
        inputs: Sequence[DataInput] = (),
        every_s: float = 1.0,
    ) -> None:
        super().__init__(name="mlflow-tracker", daemon=True)
        self._start_message = StartMessage(
            sweep=sweep, folder=folder, uri=uri, tags=dict(tags), inputs=list(inputs), every_s=every_s
        )
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._closing: CloseMessage | None = None
        self._is_closing = threading.Event()
        self._code: int | None = None

    @property
    def pid(self) -> int | None:
        """The process's, while there is one."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def run(self) -> None:
        """One process after another until one says how it went, or the last one there is a use for has ended."""
        wait_s, is_last = _AGAIN_S, False
        while not is_last:
            is_last = self._is_closing.is_set()
            self._code = self._serve()
            if self._code in (DELIVERED, BEHIND):
                return
            logger.warning("the process that shows this sweep in MLflow has ended (exit code %d)", self._code)
            self._is_closing.wait(wait_s)
            wait_s = min(2 * wait_s, 60.0)

    def close(self, *, complete: bool = True, over: str = "", patience_s: float = 60.0) -> bool:
        """Send what is left, and why the sweep is ``over``; whether MLflow has taken all of it.

        ``patience_s`` is for a server that fails; one that takes what is sent gets longer.
        """
        with self._lock:
            self._closing = CloseMessage(complete=complete, over=over, patience_s=patience_s)
            self._is_closing.set()
            self._tell(self._closing)
        self.join(patience_s + _LIMIT_S)
        return not self.is_alive() and self._code == DELIVERED

    def _serve(self) -> int:
        """Start a process and pass its warnings on, so that it does not write over a live table; its exit code."""
        with self._lock:
            self._process = process = _start()
            self._tell(self._start_message)
            if self._closing is not None:
                self._tell(self._closing)
        assert process.stdout is not None
        for line in process.stdout:
            logger.warning("%s", without_password(line.rstrip()))
        return process.wait()

    def _tell(self, what: StartMessage | CloseMessage) -> None:
        if self._process is None:
            return  # it will be told when it starts
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and another will be told
            self._process.stdin.write(what.model_dump_json() + "\n")
            self._process.stdin.flush()


def _start() -> "subprocess.Popen[str]":
    """A mirror that runs the driver's code, gives way to all else, and hears no signals from the terminal.

    Where Linux groups processes by session, a process is only nice within its own, and the session to others.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", "-m", "sweeps.engine.show.mirror"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="backslashreplace",
        start_new_session=True,
    )
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, process.pid, 10)
        Path(f"/proc/{process.pid}/autogroup").write_text("10")
    return process
