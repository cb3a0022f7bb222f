"""The words for what waiting trials want, and the autoscaler's for why it does not come."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_ERROR, DEBUG_AUTOSCALING_STATUS
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated import autoscaler_pb2
from ray.experimental.internal_kv import _internal_kv_get

from inflora.errors import one_line
from sweeps.engine.run.cluster import DRIVER

_ANSWER_S = 10
_LONGEST = 300


def needs_of(groups: Sequence[Any]) -> str:
    """What placement groups ask for; alike ones are named once."""
    told = sorted({_of_group(group) for group in groups})
    return " or ".join(told) + (" each" if len(groups) > 1 else "")


def _of_group(group: Any) -> str:
    bundles = [_of_bundle(bundle.unit_resources) for bundle in group.bundles]
    distinct = dict.fromkeys(bundles)
    told = " and ".join(f"{count} times {b}" if (count := bundles.count(b)) > 1 else b for b in distinct)
    chosen = any(bundle.label_selector for bundle in group.bundles)
    return told + (" on one of some nodes" if chosen else "")


def _of_bundle(resources: Mapping[str, float]) -> str:
    """One worker's: GPUs first, as they are what is rare."""
    if resources.get(DRIVER):
        return "a machine with room for a trial"
    rare_first = sorted((name for name, count in resources.items() if count), key=lambda name: (name != "GPU", name))
    plural = {"GPU", "CPU"}
    return " and ".join(
        f"{resources[name]:g} {name}{'s' if name in plural and resources[name] != 1 else ''}" for name in rare_first
    )


def autoscaler_problem() -> str:
    """The last error of the cluster's autoscaler in a line; empty where there is none, or no autoscaler."""
    reply = autoscaler_pb2.GetClusterStatusReply()  # type: ignore[attr-defined]
    gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
    reply.ParseFromString(gcs.get_cluster_status(timeout_s=_ANSWER_S))
    # The first autoscaler writes into Ray's store, the second one answers.
    kept = (_internal_kv_get(name) for name in (DEBUG_AUTOSCALING_ERROR, DEBUG_AUTOSCALING_STATUS))
    return problem_told(reply.autoscaling_state, *((text or b"").decode() for text in kept))


def problem_told(second: Any, error: str, status: str) -> str:
    """Whichever autoscaler it is: its own end, before a machine that could not be had, before one that cannot be."""
    if error:
        return one_line(f"the autoscaler has failed: {error.splitlines()[-1]}", _LONGEST)
    failed = [(each.failed_ts, each.ray_node_type_name, each.reason) for each in second.failed_instance_requests]
    failed += _failed_of_first(status)
    if failed:
        _, kind, reason = max(failed)
        return one_line(f"the autoscaler could not start {kind}: {reason}", _LONGEST)
    if second.infeasible_gang_resource_requests:
        return "the autoscaler may start no machine that has it"
    return ""


def _failed_of_first(status: str) -> Iterator[tuple[float, str, str]]:
    """Time, kind of machine and reason of what the first autoscaler could not start."""
    report = json.loads(status or "{}").get("autoscaler_report") or {}
    known = (report.get("node_availability_summary") or {}).get("node_availabilities") or {}
    for kind, each in known.items():
        if why := each.get("unavailable_node_information"):
            yield each["last_checked_timestamp"], kind, f"{why['category']}, {why['description']}"
