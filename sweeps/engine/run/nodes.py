"""Checks of every node before a sweep uses it: this very code, the shared folder, the same data."""

import contextlib
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from typing import NamedTuple, TypeAlias

import ray
from ray._private.state import available_resources_per_node
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from inflora.config import ConfigError, DataSettings
from inflora.errors import UserError, one_line
from inflora.files import source_hash
from inflora.storage import SharedFolder
from sweeps.engine.ledger.failures import NodeFault

_PATIENCE_S = 120.0
Answer: TypeAlias = "ray.ObjectRef[str]"


class Likeness(NamedTuple):
    """What a node must have in common with the driver's machine: the code, and the dataset."""

    code: str
    dataset: str
    root: str | None
    dataset_hash: str


@cache
def code_version() -> str:
    """The installed version and a hash of its source: two states of one version differ."""
    return f"{version('inflora-sweeps')}+{source_hash('inflora', 'sweeps.engine')}"


def likeness(data: DataSettings) -> Likeness:
    """This machine's, as it is told to the nodes."""
    return Likeness(code_version(), data.dataset, data.root, _content_hash(data.dataset, data.root))


def _content_hash(dataset: str, root: str | None) -> str:
    from inflora.data import ensure_store, read_manifest  # processes that only drive trials can do without them

    return read_manifest(ensure_store(dataset, root)).content_hash


def require_like_driver(wanted: Likeness) -> None:
    """Raise ConfigError or DataError unless this machine has the driver's code and dataset."""
    if code_version() != wanted.code:
        raise ConfigError(f"it {_differs(wanted.code)}")
    there = _content_hash(wanted.dataset, wanted.root)
    if there != wanted.dataset_hash:
        raise ConfigError(
            f"its {wanted.dataset} is of other content ({there[:12]}) than the driver's "
            f"({wanted.dataset_hash[:12]}): prepare the same on every node"
        )


@contextmanager
def faults_named() -> Iterator[None]:
    """Turn what is wrong with this machine (its code, data, GPU, a state that it cannot read) into a ``NodeFault``.

    The driver has checked all settings on its own machine: what fails here by them is this machine's, or seems so until
    another one fails alike.
    """
    try:
        yield
    except UserError as error:
        node_id = ray.get_runtime_context().get_node_id()
        reason = f"{type(error).__name__}: {error}"
        raise NodeFault(ray.util.get_node_ip_address(), node_id, reason) from None


def elsewhere(left_out: Iterable[str]) -> dict[str, str]:
    """The label selector by which Ray places nothing on these nodes."""
    nodes = sorted(left_out)
    return {"ray.io/node-id": f"!in({','.join(nodes)})"} if nodes else {}


def here(needs: Mapping[str, float]) -> dict[str, str]:
    """The label selector by which Ray places something on this very node; none where that has no room for it now."""
    here = ray.get_runtime_context().get_node_id()
    free = available_resources_per_node().get(here, {})
    return {"ray.io/node-id": here} if all(free.get(name, 0) >= need for name, need in needs.items()) else {}


def check_nodes(shared: SharedFolder) -> None:
    """Ask every other node for its code and for a file that the driver has just written to the shared place.

    Raises:
        ConfigError: A node that runs other code, cannot run it, or does not see the file.
    """
    nodes = other_nodes()
    if not nodes:
        return
    mark = new_mark(shared)
    try:
        # All at once; a node that cannot answer must not keep the others waiting.
        answers = {node_id: ask(node_id, shared.address, mark) for node_id in nodes}
        for node_id, answer in answers.items():
            if problem := problem_of(node_id, answer, _PATIENCE_S):
                raise ConfigError(f"node {nodes[node_id]} {problem}")
    finally:
        with contextlib.suppress(OSError):  # an empty file, if the place is away just now
            shared.delete(mark)


def other_nodes() -> dict[str, str]:
    """The IDs and addresses of the nodes that are alive, but for the driver's own."""
    here = ray.get_runtime_context().get_node_id()
    return {
        node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here
    }


def new_mark(shared: SharedFolder) -> str:
    """A new file in the shared place, for others to look for."""
    mark = f"seen-{uuid.uuid4().hex}"
    shared.write(mark, b"")
    return mark


def ask(node_id: str, address: str, mark: str, likeness: Likeness | None = None) -> Answer:
    """Ask a node whether it has this code, sees the ``mark`` in the shared place, and has the driver's data.

    The answer is what is wrong with it; empty if nothing is.
    """
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    # The second try is for a node that dies meanwhile: it is not known to be dead at once.
    task = ray.remote(_look).options(num_cpus=0, max_retries=1, scheduling_strategy=there)
    return task.remote(address, mark, code_version(), likeness)


def _look(address: str, mark: str, code: str, likeness: Likeness | None) -> str:
    if code_version() != code:
        return _differs(code)
    if SharedFolder(address).read(mark) is None:
        return f"does not see {address}: --shared (INFLORA_SHARED) must be a folder that all nodes see, or s3://bucket/path"
    try:
        if likeness is not None:
            require_like_driver(likeness)
    except UserError as error:
        return f"cannot run trials: {error}"
    return ""


def problem_of(node_id: str, answer: Answer, patience_s: float) -> str:
    """What is wrong with a node, from its answer; nothing with one that has died, as it will run nothing."""
    try:
        return ray.get(answer, timeout=patience_s)
    except ray.exceptions.RayError as error:
        if node_id not in other_nodes():
            return ""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return f"cannot run inflora-sweeps {code_version()}: {one_line(reason, 200)}"


def _differs(wanted: str) -> str:
    return f"has inflora-sweeps {code_version()}, the driver {wanted}: install the same on every node"
