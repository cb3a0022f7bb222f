"""A sweep as it is read, and never written to: in its folder, or the copy in its shared place, perhaps a bucket."""

import tempfile
from pathlib import Path
from typing import NamedTuple

import optuna

from inflora.config import ConfigError
from inflora.errors import one_line
from inflora.patience import NoAnswerError, within
from sweeps.engine.ledger.database import STUDY_FILE, URL_FILE
from sweeps.engine.ledger.lease import LEASE_FILE, seems_driven
from sweeps.engine.ledger.lock import is_driven
from sweeps.engine.ledger.study import load_study
from sweeps.engine.space.spec import SPEC_FILE, Sweep, read_sweep

PATIENCE_S = 20.0
"""The time within which a bucket must answer."""


class Kept(NamedTuple):
    """A sweep and its study as they are now, to be read; ``driven``: a driver is at work on it."""

    sweep: Sweep
    study: optuna.Study
    driven: bool


def read_kept(address: str) -> Kept:
    """The sweep in a folder, or in a bucket's (``s3://bucket/path/name``).

    Raises:
        ConfigError: None is there, or it cannot be read.
    """
    try:
        return within(PATIENCE_S, lambda: _fetch(address)) if "://" in address else _read(Path(address))
    except (NoAnswerError, OSError) as error:
        raise ConfigError(f"cannot read {one_line(address, 300)}: {one_line(str(error), 300)}") from None


def _read(folder: Path) -> Kept:
    sweep, lease = read_sweep(folder), folder / LEASE_FILE
    driven = is_driven(folder) or seems_driven(lease.read_bytes() if lease.is_file() else None)
    return Kept(sweep, load_study(sweep, folder), driven)


def _fetch(address: str) -> Kept:
    """Read a bucket's files by way of a folder, which nobody hears of."""
    from inflora.storage import SharedFolder  # brings pyarrow along, for which a folder's reader must not wait

    place = SharedFolder(address.rstrip("/"))
    with tempfile.TemporaryDirectory() as name:
        for file in (SPEC_FILE, STUDY_FILE, URL_FILE, LEASE_FILE):
            if (content := place.read(file)) is not None:
                (Path(name) / file).write_bytes(content)
        try:
            return _read(Path(name))
        except ConfigError as error:
            raise ConfigError(str(error).replace(name, place.address)) from None
