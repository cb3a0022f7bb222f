"""What a sweep is told to use answers within seconds, or one line says why it cannot be used; nothing is made."""

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from inflora.config import ConfigError
from inflora.errors import without_password
from inflora.storage import SharedFolder
from sweeps.cli import parse_seeds
from sweeps.engine.run import reach
from sweeps.engine.run.cluster import Cluster
from sweeps.engine.run.preflight import trials_place
from sweeps.engine.run.reach import reachable_ray, reachable_store
from sweeps.engine.show.output import check_output

from .server import free_port


class _Pages(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def ports() -> Iterator[dict[str, int]]:
    """Of nobody, of somebody who never says a word, and of a server of web pages."""
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pages)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield {"NOBODY": free_port(), "SILENT": silent.getsockname()[1], "WEB": web.server_port}
    web.shutdown()


def with_port(address: str, ports: dict[str, int]) -> str:
    for name, port in ports.items():
        address = address.replace(name, str(port))
    return address


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:NOBODY", "does not answer: Connection refused"),
        ("ray://127.0.0.1:10001", "this runs on a machine of the cluster, not as a client of it"),
        ("127.0.0.1:SILENT", "does not answer"),
        ("127.0.0.1:WEB", "does not answer|is no head"),
        ("localhost", "is host:port"),
        ("http://localhost:6379", "is host:port"),
        ("localhost:99999", "is host:port"),
        ("x" * 5000 + ":6379", "does not answer"),
    ],
)
def test_a_ray_that_cannot_be_joined_is_one_line_within_seconds(ports, monkeypatch, address, reason):
    monkeypatch.setattr(reach, "PATIENCE_S", 2.5)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=reason) as refused:
        reachable_ray(with_port(address, ports))
    assert time.monotonic() - start < 5
    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < 600


def test_the_environments_address_is_asked_too(ports, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", with_port("127.0.0.1:NOBODY", ports))
    with pytest.raises(ConfigError, match="Connection refused"):
        reachable_ray(None)
    reachable_ray("local")


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("http://127.0.0.1:NOBODY", "does not answer: .*Connection refused"),
        ("http://127.0.0.1:SILENT", "does not answer"),
        ("http://127.0.0.1:WEB", "is no MLflow server"),
        ("http://", "does not answer"),
        ("mysql://somebody:secret@localhost/runs", "needs a driver that is not installed"),
        ("postgresql+psycopg://somebody:secret@127.0.0.1:NOBODY/runs", "does not answer"),
        ("postgresql+nodriver://localhost/runs", "is no database URI"),
        ("sqlite:///FOLDER/none/mlflow.db", "there is no folder"),
        ("sqlite:///FOLDER", "is no file"),
        ("sqlite:///FOLDER/text", "file is not a database"),
        ("sqlite:///FOLDER/text/mlflow.db", "there is no folder"),
        ("sqlite://", "is no file"),
        ("sqlite://host:54x/mlflow.db", "is no file"),
        ("postgresql+psycopg://somebody:secret@127.0.0.1:54x/runs", "does not answer"),
        ("sqlite:///:memory:", "is no file"),
        ("sqlite:///file:x?uri=true", "is no file"),
        ("./mlruns", "a tracking URI starts with"),
        ("", "a tracking URI starts with"),
    ],
)
def test_a_tracking_store_that_cannot_be_used_is_one_line_within_seconds(ports, tmp_path, monkeypatch, uri, reason):
    monkeypatch.setattr(reach, "PATIENCE_S", 2.5)
    (tmp_path / "text").write_text("no database " * 500)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=reason) as refused:
        reachable_store(with_port(uri, ports).replace("FOLDER", str(tmp_path)))
    assert time.monotonic() - start < 5
    assert len(str(refused.value).splitlines()) == 1
    assert "secret" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["text"], "nothing is made by asking"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("http://me@host:5000", "http://me@host:5000"),
        ("mysql+pymysql://me:se@c/ret@host/runs?x=1", "mysql+pymysql://me:***@host/runs?x=***"),
        ("me:secret@host", "me:***@host"),
        ("postgresql://h/db?user=me&password=secret", "postgresql://h/db?user=***&password=***"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Dsecret", "mssql+pyodbc:///?odbc_connect=***"),
        (
            "mssql+pyodbc:///?odbc_connect=DRIVER={A 17};PWD=se=c?ret",
            "mssql+pyodbc:///?odbc_connect=*** 17};PWD=***",
        ),
        (
            "API request to http://me:secret@host/api failed: HTTPConnectionPool(host='host', port=5000), at 12:30",
            "API request to http://me:***@host/api failed: HTTPConnectionPool(host='host', port=5000), at 12:30",
        ),
    ],
)
def test_a_password_is_not_shown(text, shown):
    assert without_password(text) == shown


def test_a_database_that_is_to_be_made_needs_a_folder_that_is_there_or_will_be(tmp_path):
    reachable_store(f"sqlite:///{tmp_path / 'mlflow.db'}")
    reachable_store(f"sqlite:///{tmp_path / 'digits' / 'mlflow.db'}", tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["", ".", "/", "folder", "report", "report.txt", "file/report.html", "n" * 300 + ".html"]
)
def test_an_output_that_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"-o must|cannot write"):
        check_output(Path(name), (".html",))
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}


@pytest.mark.parametrize("text", ["", "a", "-1", "0,,1", "1,1", "4294967296", "9" * 5000, "1_0", "²", "1.5", "0x1"])
def test_seeds_are_different_whole_numbers_that_every_generator_takes(text):
    with pytest.raises(ConfigError, match="--seeds must be different whole numbers") as refused:
        parse_seeds(text)
    assert len(str(refused.value)) < 400


def test_a_bucket_that_does_not_answer_is_one_line(tiny_sweep, tmp_path, monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(SharedFolder, "read", lambda *_: never.wait())
    monkeypatch.setattr("sweeps.engine.run.preflight.PATIENCE_S", 0.01)
    with pytest.raises(ConfigError, match=r"^--shared gs://bucket/x/tiny does not answer within 0 seconds$"):
        trials_place(tiny_sweep, tmp_path, Cluster(shared="gs://bucket/x"))
    never.set()
