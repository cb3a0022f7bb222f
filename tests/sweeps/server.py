"""An MLflow server that tests start and kill."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Self


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
