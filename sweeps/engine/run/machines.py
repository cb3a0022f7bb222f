"""The machines of a cluster as their labels price them, and how much of each is taken."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ray
from ray._private.state import available_resources_per_node

from sweeps.engine.ledger.bill import Machine, price_of, share
from sweeps.engine.space.spec import Resources

Node = Mapping[str, Any]
"""A machine as ``ray.nodes()`` has it."""


class Rate(NamedTuple):
    """Prices per hour: of the machines' shares that one trial takes, and of the machines that train nothing."""

    trial: float
    others: float


def priced_machines(resources: Resources) -> list[Machine]:
    """The machines that are alive and declare a price, with what is taken of them, by whomever.

    Raises:
        ConfigError: A label that is no price.
    """
    name, free = trained_on(resources), available_resources_per_node()
    priced = [(price_of(node["Labels"]), node) for node in ray.nodes() if node["Alive"]]
    return [Machine(price, taken(name, node, free.get(node["NodeID"], {}))) for price, node in priced if price]


def trained_on(resources: Resources) -> str:
    """The resource by which a trial's share of a machine is told: GPUs where it takes some."""
    return "GPU" if resources.gpus_per_worker else "CPU"


def taken(name: str, node: Node, free: Mapping[str, float]) -> float:
    """The share of a machine that is taken."""
    total = node["Resources"].get(name, 0.0)
    return share(total - free.get(name, 0.0), total)


def rate(resources: Resources, nodes: Sequence[Node], node_id: str) -> Rate:
    """The prices of a cluster whose machines that train are like the one with this ID.

    Raises:
        ConfigError: A label that is no price.
    """
    name = trained_on(resources)
    worker = {"GPU": resources.gpus_per_worker, "CPU": resources.cpus_per_worker}[name]
    alive = [node for node in nodes if node["Alive"]]
    trial = sum(
        price_of(node["Labels"]) * share(worker, node["Resources"].get(name, 0.0))
        for node in alive
        if node["NodeID"] == node_id
    )
    others = sum(price_of(node["Labels"]) for node in alive if not node["Resources"].get(name))
    return Rate(resources.workers * trial, others)
