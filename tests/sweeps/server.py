"""Servers that tests start and kill: MLflow's and PostgreSQL's."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Self

import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A real MLflow server in a process group of its own; it takes seconds until it is ``ready``."""

    def __init__(self, folder: Path, port: int, store: str | None = None) -> None:
        self.uri = f"http://127.0.0.1:{port}"
        where = ["--host", "127.0.0.1", "--port", str(port), "--artifacts-destination", folder / "art"]
        store = store or f"sqlite:///{folder / 'server.db'}"
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1", *where]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **quiet)

    def ready(self) -> Self:
        """Wait until it answers."""
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1)
                return self
            except OSError:
                time.sleep(0.2)
        raise TimeoutError("the MLflow server did not start")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


needs_postgres = pytest.mark.skipif(
    not (shutil.which("initdb") and shutil.which("postgres") and importlib.util.find_spec("psycopg")),
    reason="no PostgreSQL on the path, or no driver for it",
)


class Postgres:
    """A database server of a test's own; what is in it outlives a kill."""

    def __init__(self) -> None:
        self._folder, self._port = Path(tempfile.mkdtemp()), free_port()
        self.uri = f"postgresql://mlflow@127.0.0.1:{self._port}/postgres"
        self._as_user = []
        if os.geteuid() == 0:  # postgres refuses to be root
            self._as_user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
            os.chown(self._folder, 65534, 65534)
        self._quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": self._folder}
        command = [*self._as_user, "initdb", "-D", self._folder / "data", "-U", "mlflow", "-A", "trust"]
        subprocess.run(command, check=True, **self._quiet)
        self.start()

    def start(self) -> None:
        import psycopg

        options = ["-p", str(self._port), "-k", str(self._folder), "-h", "127.0.0.1"]
        command = [*self._as_user, "postgres", "-D", self._folder / "data", *options]
        self.process = subprocess.Popen(command, **self._quiet)
        for _ in range(300):
            try:
                psycopg.connect(self.uri).close()
                return
            except psycopg.OperationalError:
                time.sleep(0.2)
        raise TimeoutError("the database server did not start")

    def stop(self) -> None:
        """At once, as a crash: whoever is amid a transaction hears of it."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait()

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self._folder)
