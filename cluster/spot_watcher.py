"""On a spot machine: asks Amazon every few seconds whether it takes the machine back, and then drains the Ray node.

A drained node gets no new work, and Ray Train moves its trials (from their last finished task) before the machine goes.
Started on every worker by ``gpu.yaml``; on an on-demand machine the answer is always no.

python spot_watcher.py [ADDRESS OF THE METADATA]
"""

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


def drain(deadline: datetime) -> None:
    """Tell the cluster that this node ends at ``deadline``."""
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    context = ray.get_runtime_context()
    left_s = max(1, int((deadline - datetime.now(UTC)).total_seconds()))
    ray_command = str(Path(sys.executable).with_name("ray"))
    command = [ray_command, "drain-node", "--address", context.gcs_address, "--node-id", context.get_node_id()]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot machine is taken back"]
    subprocess.run([*command, *reason, "--deadline-remaining-seconds", str(left_s)], check=True)


def watch(metadata: str = METADATA, every_s: float = EVERY_S) -> None:
    """Wait for the notice, drain, end."""
    while (deadline := notice(metadata)) is None:
        time.sleep(every_s)
    print(f"this machine is taken back at {deadline}", flush=True)
    drain(deadline)


if __name__ == "__main__":
    watch(*sys.argv[1:])
