"""The lease of a shared place: one driver at a time, whichever machine it is on.

The lock of a sweep's folder is seen on its own machine. A lease is a small file in the place itself, which its driver
writes anew every few seconds. No clock is compared with another machine's: a lease is dead when it has not changed
while it was watched, by the watcher's own clock. The lease of a process of this very machine is dead when that is gone:
who starts a killed sweep again waits for nothing.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from inflora.config import ConfigError
from inflora.errors import UserError, one_line
from inflora.patience import NoAnswerError, patiently, within

if TYPE_CHECKING:
    from inflora.storage import SharedFolder  # brings pyarrow along, for which `sweeps status` must not wait

logger = logging.getLogger(__name__)

LEASE_FILE = "driver.json"
"""The lease, in a sweep's shared place."""

RENEW_S = 10.0
STALE_S = 60.0
"""The time without a change after which a lease is dead: longer than network file systems show what is old."""

SETTLE_S = 1.0
"""The time after which, of drivers that start at one moment, all but the last to write see that they are not alone."""

_SHOWN_S = 300.0
"""The age by this machine's clock up to which a lease is shown as alive: to show it, nobody wants to wait."""


class Holder(BaseModel):
    """The driver that holds a place; ``machine`` is that on which its ``pid`` means something, ``began`` when."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    owner: str
    host: str
    machine: str
    pid: int
    began: str
    renewed_ms: int

    @property
    def shown(self) -> str:
        """Its name for people."""
        return f"process {self.pid} on {one_line(self.host, 100)}"


_OWNER = uuid.uuid4().hex
"""This process: a number may be another's by now, or another machine's."""


def this_process() -> Holder:
    """The lease that this process would write now."""
    return Holder(
        owner=_OWNER,
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        began=_began(os.getpid()) or "",
        renewed_ms=int(time.time() * 1000),
    )


def _machine() -> str:
    """Where a process id means one process: a running kernel and, on it, a container; empty where nobody can tell.

    A host's name would not do: machines that were made from one image share theirs.
    """
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _began(pid: int) -> str | None:
    """The moment at which a process of this machine began; None where none of this number is alive."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # a zombie drives nothing


def holder(place: "SharedFolder") -> Holder | None:
    """The driver whose lease lies in the place.

    Raises:
        OSError: The place is away.
    """
    return _understood(place.read(LEASE_FILE))


def _understood(content: bytes | None) -> Holder | None:
    try:
        return None if content is None else Holder.model_validate_json(content)
    except ValidationError:
        return None  # no driver has written that


class ReplacedError(UserError):
    """Another driver has taken this one for dead, and goes on in its place or has ended the sweep there."""


def require_ours(place: "SharedFolder") -> None:
    """Raise ReplacedError if another driver has taken the place over, though it may have given it back by now.

    Raises:
        OSError: The place is away.
    """
    held = holder(place)
    if held is None:
        place.require()  # a folder that is away holds no lease either
        held = holder(place)  # it may just have come back
    if held is None:
        raise ReplacedError(f"another driver has had {place.address} meanwhile, or its {LEASE_FILE} was removed")
    if held.owner != _OWNER:
        raise ReplacedError(f"{held.shown} has taken {place.address} over")


def refuse_if_driven(place: "SharedFolder") -> None:
    """Raise ConfigError if another driver holds the place and can be seen to live, which needs no watching."""
    held = holder(place)
    if held is not None and held.owner != _OWNER and _is_alive(held):
        raise _is_run_by(place, held)


def _is_run_by(place: "SharedFolder", held: Holder) -> ConfigError:
    return ConfigError(f"the sweep in {place.address} is being run by {held.shown}")


def seems_driven(content: bytes | None) -> bool:
    """True if a lease's content is that of a driver which is alive, as far as a look can tell."""
    held = _understood(content)
    if held is None:
        return False
    alive = _is_alive(held)
    return abs(time.time() - held.renewed_ms / 1000) < _SHOWN_S if alive is None else alive


def _is_alive(held: Holder) -> bool | None:
    """True if its process is alive; None where only its own machine could tell."""
    if not held.machine or held.machine != _machine():
        return None
    return _began(held.pid) == held.began


@contextmanager
def leased(
    place: "SharedFolder",
    say: Callable[[str], None],
    *,
    patience_s: float = 0.0,
    renew_s: float = RENEW_S,
    stale_s: float = STALE_S,
) -> Iterator[None]:
    """Hold a shared place; a driver that another has taken for dead and replaced hears of it as of Ctrl-C.

    ``patience_s``: for so long a place that is away is waited for.

    Raises:
        ConfigError: Another driver holds it and is alive.
    """
    try:
        patiently(
            patience_s, lambda: _take(place, say, stale_s), lambda why: say(f"waiting for {place.address}: {why}")
        )
    except OSError as error:
        raise ConfigError(f"cannot write into {place.address}: {one_line(str(error), 300)}") from None
    renewal = _Renewal(place, say, renew_s)
    renewal.start()
    try:
        yield
    finally:
        renewal.stop()
        with contextlib.suppress(OSError, NoAnswerError):
            within(renew_s, lambda: _give_back(place))


def _take(place: "SharedFolder", say: Callable[[str], None], stale_s: float) -> None:
    held = holder(place)
    if held is not None and held.owner != _OWNER:
        alive = _is_alive(held)
        if alive is None:
            say(f"{place.address} is held by {held.shown}: {stale_s:.0f} seconds to see whether that is alive")
            alive = _changes(place, held, stale_s)
        if alive:
            raise _is_run_by(place, held)
        say(f"{held.shown} is gone: its lease of {place.address} is taken over")
    place.write(LEASE_FILE, this_process().model_dump_json().encode())
    time.sleep(SETTLE_S)
    other = holder(place)
    if other is not None and other.owner != _OWNER:
        raise _is_run_by(place, other)


def _changes(place: "SharedFolder", held: Holder, stale_s: float) -> bool:
    """Watch a lease: true as soon as it has been renewed, false if it has not been, or was given back."""
    end = time.monotonic() + stale_s
    while time.monotonic() < end:
        time.sleep(min(1.0, stale_s / 10))
        now = holder(place)
        if now is None:
            return False
        if now != held:
            return True
    return False


def _give_back(place: "SharedFolder") -> None:
    held = holder(place)
    if held is not None and held.owner == _OWNER:
        place.delete(LEASE_FILE)


def _heard_signal() -> signal.Signals:
    """The signal that ends this process in order: Ctrl-C, which one in a script's background was told to ignore."""
    return signal.SIGTERM if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else signal.SIGINT


class _Renewal(threading.Thread):
    """Writes the lease anew until it is stopped; a place that is away keeps it waiting, and nobody else."""

    def __init__(self, place: "SharedFolder", say: Callable[[str], None], every_s: float) -> None:
        super().__init__(name="lease", daemon=True)
        self._place, self._say, self._every_s = place, say, every_s
        self._stopped = threading.Event()

    def run(self) -> None:
        was_away = False
        while not self._stopped.wait(self._every_s):
            try:
                self._place.require()
                require_ours(self._place)
                self._place.write(LEASE_FILE, this_process().model_dump_json().encode())
            except ReplacedError as error:
                self._say(f"{error}: this driver ends")
                os.kill(os.getpid(), _heard_signal())
                return
            except OSError as error:
                if not was_away:
                    logger.warning(
                        "%s is away, what needs it waits: %s", self._place.address, one_line(str(error), 300)
                    )
                was_away = True
            else:
                was_away = False

    def stop(self) -> None:
        """End it; one that is held up by a place that is away is left to itself."""
        self._stopped.set()
        self.join(self._every_s)
