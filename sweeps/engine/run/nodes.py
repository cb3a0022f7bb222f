"""Checks of every node before a sweep uses it: this very code, and the shared folder."""

import hashlib
import uuid
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from inflora.config import ConfigError
from inflora.storage import SharedFolder

_PATIENCE_S = 120.0
Answer: TypeAlias = "ray.ObjectRef[tuple[str, bool]]"


@cache
def code_version() -> str:
    """The installed version and a hash of its source: two states of one version differ."""
    digest = hashlib.sha256()
    for package in ("inflora", "sweeps.engine"):
        root = Path(str(files(package)))
        for file in sorted(root.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return f"{version('inflora-sweeps')}+{digest.hexdigest()[:8]}"


def require_code(wanted: str) -> None:
    """Refuse to work on a node that joined later with other code than the driver's.

    Raises:
        ConfigError: The code is not that of version ``wanted``.
    """
    if code_version() != wanted:
        raise ConfigError(_differs(ray.util.get_node_ip_address(), code_version(), wanted))


def check_nodes(shared: SharedFolder) -> None:
    """Ask every other node for its code and for a file that the driver has just written to the shared place.

    Raises:
        ConfigError: A node that runs other code, cannot run it, or does not see the file.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    if not nodes:
        return
    mark = f"seen-{uuid.uuid4().hex}"
    shared.write(mark, b"")
    try:
        # All at once; a node that cannot answer must not keep the others waiting.
        answers = [_ask(node["NodeID"], shared.address, mark) for node in nodes]
        for node, answer in zip(nodes, answers, strict=True):
            _check_answer(node, answer, shared.address)
    finally:
        shared.delete(mark)


def _ask(node_id: str, address: str, mark: str) -> Answer:
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    # The second try is for a node that dies meanwhile: it is not known to be dead at once.
    return ray.remote(_look).options(num_cpus=0, max_retries=1, scheduling_strategy=there).remote(address, mark)


def _look(address: str, mark: str) -> tuple[str, bool]:
    return code_version(), SharedFolder(address).read(mark) is not None


def _check_answer(node: dict[str, Any], answer: Answer, address: str) -> None:
    where = node["NodeManagerAddress"]
    try:
        theirs, sees = ray.get(answer, timeout=_PATIENCE_S)
    except ray.exceptions.RayError as error:
        if node["NodeID"] not in {each["NodeID"] for each in ray.nodes() if each["Alive"]}:
            return  # it has died, and will run nothing
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ConfigError(f"node {where} cannot run inflora-sweeps {code_version()}: {reason[:200]}") from None
    if theirs != code_version():
        raise ConfigError(_differs(where, theirs, code_version()))
    if not sees:
        raise ConfigError(
            f"node {where} does not see {address}: --shared (INFLORA_SHARED) must be a folder that all nodes see, "
            "or s3://bucket/path"
        )


def _differs(node: str, theirs: str, ours: str) -> str:
    return f"node {node} has inflora-sweeps {theirs}, the driver {ours}: install the same on every node"
