"""On a spot machine: asks Amazon every few seconds whether it takes the machine back, and then drains the Ray node.

A drained node gets no new work. Its trials learn on until the machine goes, and then elsewhere from their last finished
task. Started on every worker by ``gpu.yaml``; on an on-demand machine the answer is always no.

python spot_watcher.py [ADDRESS OF THE METADATA]
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import ray

METADATA = "http://169.254.169.254/latest"
EVERY_S = 5.0
PID_FILE = Path.home() / "spot_watcher.pid"


def notice(metadata: str = METADATA) -> datetime | None:
    """When the machine is taken back; None while it is not."""
    try:
        token = _ask(f"{metadata}/api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
        when = _ask(f"{metadata}/meta-data/spot/termination-time", "GET", {"X-aws-ec2-metadata-token": token})
        return datetime.strptime(when, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except (OSError, ValueError):  # not found is the usual answer; what cannot be read is asked for again
        return None


def _ask(url: str, method: str, headers: dict[str, str]) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, method=method, headers=headers), timeout=2) as answer:
        return str(answer.read().decode())


def replace_previous(pid_file: Path = PID_FILE) -> None:
    """End the watcher that an earlier start of Ray has left here: `ray stop` knows nothing of it."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        # Another process may have its number by now, even this one.
        if pid != os.getpid() and b"spot_watcher.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGTERM)
    pid_file.write_text(str(os.getpid()))


def drain(deadline: datetime, every_s: float = EVERY_S) -> None:
    """Tell the cluster that this node ends at ``deadline``; where it is too busy to hear, again until then."""
    while True:
        left_s = int((deadline - datetime.now(UTC)).total_seconds())
        try:
            return _drain(max(1, left_s))
        except Exception as error:  # of many kinds, and nobody else would tell it
            if left_s <= 0:
                raise
            print(f"the cluster does not hear it: {error}", flush=True)
            time.sleep(every_s)


def _drain(left_s: int) -> None:
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
    context = ray.get_runtime_context()
    ray_command = str(Path(sys.executable).with_name("ray"))
    command = [ray_command, "drain-node", "--address", context.gcs_address, "--node-id", context.get_node_id()]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot machine is taken back"]
    subprocess.run([*command, *reason, "--deadline-remaining-seconds", str(left_s)], check=True, timeout=30)


def watch(metadata: str = METADATA, every_s: float = EVERY_S) -> None:
    """Wait for the notice, drain, end."""
    while (deadline := notice(metadata)) is None:
        time.sleep(every_s)
    print(f"this machine is taken back at {deadline}", flush=True)
    drain(deadline)


if __name__ == "__main__":
    replace_previous()
    watch(*sys.argv[1:])
