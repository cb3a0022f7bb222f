"""Does what a sweep is told to use answer? Asked before anything is made or started, and for a few seconds only.

Ray and MLflow try for minutes, with many lines of their own, to reach what is not there.
"""

import json
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import requests
from sqlalchemy import create_engine, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from inflora.config import ConfigError
from inflora.errors import one_line, without_password
from inflora.patience import NoAnswerError, within
from sweeps.engine.ledger.database import with_driver
from sweeps.engine.ledger.snapshot import snapshot
from sweeps.engine.show.output import check_can_write

PATIENCE_S = 10.0
"""The time within which an answer must come."""

STORES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")


class Unreachable(Exception):
    """The reason why something does not answer as it should."""


def reachable_store(uri: str, own: Path | None = None) -> None:
    """Check that a tracking store answers; a database file that is not there yet is fine, and is not made.

    ``own`` is the sweep's own folder, which may not be there yet.

    Raises:
        ConfigError: No tracking URI, or nothing answers there.
    """
    shown = one_line(without_password(uri), 300)
    match store_scheme(uri):
        case "http" | "https":
            ask: Callable[[], object] = lambda: _ask_server(uri)  # noqa: E731
        case "sqlite":
            ask = lambda: _ask_file(uri, own)  # noqa: E731
        case "databricks":
            return  # its own client knows where it is
        case _:
            ask = lambda: _ask_database(uri)  # noqa: E731
    _within(PATIENCE_S, f"the tracking store {shown}", ask)


def reachable_study(url: str) -> None:
    """Check that the server of a study's database answers, and lets us in.

    Raises:
        ConfigError: It does not.
    """
    _within(PATIENCE_S, f"--study {one_line(url, 300)}", lambda: _ask_database(with_driver(url)))


def store_scheme(uri: str) -> str:
    """The kind of tracking store that a URI names, whatever driver it asks for (``mysql+pymysql://``).

    Raises:
        ConfigError: None that MLflow knows.
    """
    scheme = uri.partition(":")[0].partition("+")[0]
    if scheme not in STORES:
        known = ", ".join(f"{each}://" for each in STORES[1:])
        shown = one_line(without_password(uri), 300)
        raise ConfigError(f"a tracking URI starts with http://, {known}, got {shown!r}")
    return scheme


def reachable_ray(address: str | None) -> None:
    """Check that a Ray cluster answers at the address that was given, here or as ``RAY_ADDRESS``, and lets us in.

    Raises:
        ConfigError: No address, or no cluster that this program could join.
    """
    given = address or os.environ.get("RAY_ADDRESS")
    if given in (None, "", "auto", "local"):
        return  # Ray knows what runs on this machine
    shown = one_line(given, 100)
    if given.startswith("ray://"):  # Tune moves itself into the cluster then, without the study and its lock
        raise ConfigError(f"this runs on a machine of the cluster, not as a client of it ({shown}): use ray job submit")
    host, _, port = given.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port[:6]) < 65536:
        raise ConfigError(f"a Ray address is host:port, auto or local, got {shown!r}")
    _within(PATIENCE_S, f"Ray at {shown}", lambda: _ask_head(f"{host}:{port}"))


def _within(seconds: float, what: str, ask: Callable[[], object]) -> None:
    """Raise ConfigError unless ``ask`` returns in time: ``what`` does not answer, or why it has failed."""
    try:
        within(seconds, ask)
    except ConfigError:
        raise
    except (NoAnswerError, Unreachable) as error:
        raise ConfigError(f"{what} {one_line(without_password(str(error)), 300)}") from None
    except Exception as error:  # whatever a driver raises, it is why there is no answer
        reason = without_password(f"does not answer: {error or type(error).__name__}")
        raise ConfigError(f"{what} {one_line(reason, 300)}") from None


def _ask_server(uri: str) -> None:
    """Ask an MLflow server for anything; one that wants to know first who asks has answered too."""
    try:
        answer = requests.get(
            f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search",
            params={"max_results": "1"},
            timeout=(PATIENCE_S / 2, PATIENCE_S),
            allow_redirects=False,
        )
    except requests.exceptions.SSLError:
        return  # it is there; MLflow's client has certificates of its own
    except requests.exceptions.RequestException as error:
        reason = getattr(error.args[0], "reason", error) if error.args else error
        raise Unreachable(f"does not answer: {str(reason).rpartition(': ')[2]}") from None
    if answer.status_code >= 500:
        raise Unreachable(f"answers with error {answer.status_code}")
    if answer.status_code in (200, 404) and not answer.headers.get("Content-Type", "").startswith("application/json"):
        raise Unreachable(f"is no MLflow server (it answers with code {answer.status_code})")


def _ask_database(uri: str) -> None:
    """Connect once, through the very driver that MLflow will use."""
    try:
        engine = create_engine(uri, poolclass=NullPool)
        with engine.connect():
            pass
    except (ArgumentError, NoSuchModuleError) as error:
        raise Unreachable(f"is no database URI: {error}") from None
    except ImportError as error:
        raise Unreachable(f"needs a driver that is not installed: {error}") from None
    except SQLAlchemyError as error:
        # The driver's first sentence says it, the rest is advice and SQLAlchemy's own.
        raise Unreachable(f"does not answer: {str(getattr(error, 'orig', error)).splitlines()[0]}") from None


def _ask_file(uri: str, own: Path | None) -> None:
    """Look into a database file without changing it: MLflow's, an empty one, or none in a folder that there is."""
    file = sqlite_file(uri)
    if file is None:
        raise Unreachable("is no file: a sqlite URI is sqlite:////absolute/path.db or sqlite:///relative.db")
    if not file.exists():
        if not file.parent.is_dir() and (own is None or file.parent != own.absolute()):
            raise Unreachable(f"cannot be made: there is no folder {file.parent}")
        check_can_write(file.parent)
        return
    try:
        with closing(snapshot(file)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except (OSError, sqlite3.Error) as error:
        raise Unreachable(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    # What a stop has left half-made has some of MLflow's tables, and is mended when it is opened.
    if (tables and not tables & {"experiments", "alembic_version"}) or "studies" in tables:
        raise Unreachable(f"is a database of something else, with the tables {', '.join(sorted(tables))}")
    if not os.access(file, os.W_OK):
        raise Unreachable("cannot be written to")


def sqlite_file(uri: str) -> Path | None:
    """The file that a ``sqlite:///`` URI names; None where it names none."""
    try:
        url = make_url(uri)
    except (ArgumentError, ValueError):  # ValueError: of a port that is no number
        return None
    if url.get_backend_name() != "sqlite" or url.host or not url.database or url.database.startswith((":", "file:")):
        return None
    return Path(url.database).absolute()


def _ask_head(address: str) -> None:
    """Ask a cluster's head which Ray it runs, as a driver does that joins it."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.utils import check_version_info
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    request = gcs_service_pb2.InternalKVGetRequest(namespace=b"cluster", key=b"CLUSTER_METADATA")  # type: ignore[attr-defined]
    channel: Any = init_grpc_channel(address, [("grpc.enable_http_proxy", 0)])
    try:
        stub = gcs_service_pb2_grpc.InternalKVGcsServiceStub(channel)
        answer = stub.InternalKVGet(request, timeout=PATIENCE_S - 2)
    except grpc.RpcError as error:
        match error.code():
            case grpc.StatusCode.UNAUTHENTICATED:
                raise Unreachable(
                    "wants its own token: set RAY_AUTH_MODE=token, with the cluster's token in ~/.ray/auth_token"
                ) from None
            case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED:
                raise Unreachable(f"does not answer: {error.details().rpartition(': ')[2].rstrip(']')}") from None
            case _:
                raise Unreachable(f"is no head of a cluster: {error.details()}") from None
    finally:
        channel.close()
    if answer.value:
        try:
            check_version_info(json.loads(answer.value), "this program")
        except RuntimeError as error:
            raise Unreachable(f"cannot be joined: {error}") from None
