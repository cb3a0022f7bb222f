"""The process that shows a sweep in MLflow, as its driver sees it."""

import logging
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel

from sweeps.engine.spec import Sweep

logger = logging.getLogger(__name__)


class Errand(BaseModel):
    """What the process is told when it starts."""

    sweep: Sweep
    folder: Path
    uri: str
    tags: dict[str, str]
    every_s: float


class Closing(BaseModel):
    """What it is told at the end: whether the sweep is ``complete``, or why it is ``over``, and how long to try."""

    complete: bool
    over: str
    patience_s: float


class Done(BaseModel):
    """What it says last: whether MLflow has everything, and the processor time it took."""

    delivered: bool
    cpu_s: float


class Tracker:
    """Has a process keep MLflow up to date until it is closed; a process of its own takes none of the driver's time.

    It ends with the driver, however that ends: its input is the driver's pipe.
    """

    def __init__(self, sweep: Sweep, folder: Path, uri: str, tags: Mapping[str, str], every_s: float = 1.0) -> None:
        self._errand = Errand(sweep=sweep, folder=folder, uri=uri, tags=dict(tags), every_s=every_s)
        self._process: subprocess.Popen[str] | None = None
        self.cpu_s = 0.0

    def start(self) -> None:
        """Start the process. It takes no signals from the terminal: the driver says when it is over."""
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "sweeps.engine.mirror"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        threading.Thread(target=_warn_of, args=(self._process,), daemon=True).start()
        self._tell(self._errand.model_dump_json())

    @property
    def pid(self) -> int | None:
        """The process's, while there is one."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def close(self, *, complete: bool = True, over: str = "", patience_s: float = 60.0) -> bool:
        """Send what is left, and why the sweep is ``over``; whether MLflow has taken all of it in ``patience_s``."""
        closing = Closing(complete=complete, over=over, patience_s=patience_s)
        done = self._end(closing)
        if done is None:  # something has killed it: the study still holds what it had to send
            self.start()
            done = self._end(closing)
        self.cpu_s = done.cpu_s if done else 0.0
        return done is not None and done.delivered

    def _end(self, closing: Closing) -> Done | None:
        """What the process says last; None if it ended without a word."""
        assert self._process is not None and self._process.stdout is not None
        self._tell(closing.model_dump_json())
        try:
            self._process.wait(closing.patience_s + 30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return Done(delivered=False, cpu_s=0.0)
        said = self._process.stdout.read().splitlines()
        return Done.model_validate_json(said[-1]) if said else None

    def _tell(self, line: str) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; close looks after that


def _warn_of(process: subprocess.Popen[str]) -> None:
    """Pass on what the process says beside its work, so that it does not write over a live table."""
    assert process.stderr is not None
    for line in process.stderr:
        logger.warning("%s", line.rstrip())
