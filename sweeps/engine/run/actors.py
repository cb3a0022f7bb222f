"""Tune and Train, told what they do not know of actors that are gone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.state import actors as actor_table
from ray.air.execution._internal import RayActorManager
from ray.core.generated import gcs_pb2, gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.tune.execution import tune_controller
from ray.util.placement_group import PlacementGroup, remove_placement_group

_ANSWER_S = 10.0
_State: Any = gcs_pb2.PlacementGroupTableData  # type: ignore[attr-defined]


class ForgivingActorManager(RayActorManager):
    """Tune's actor manager, to which whatever Ray says of an actor is that actor's failure.

    Tune's own knows dead actors and failed tasks. Of anything else, as of an actor that Ray has killed because its
    machine ran out of memory, it makes the end of all trials.
    """

    def _actor_task_failed(self, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, RayError) and not isinstance(exception, RayActorError | RayTaskError):
            # The kind of error that it takes for an actor's death; the words are kept.
            exception = RayActorError(error_msg=f"ray.exceptions.{type(exception).__name__}: {exception}")
        super()._actor_task_failed(tracked_actor_task, exception)


@contextmanager
def forgiving() -> Iterator[None]:
    """Let Tune take its actor manager from here: it has no way to be told."""
    with mock.patch.object(tune_controller, "RayActorManager", ForgivingActorManager):
        yield


def remove_groups_of_dead_actors() -> None:
    """Remove the placement groups of creators that have died: Ray keeps them while the driver lives.

    A trial's controller makes a group and waits for room. When it dies, its group waits on, and takes the room when it
    comes; nor does one give its room back whose workers have started.
    """
    for group in _groups():
        # Of the driver's own groups Ray says that their creator is dead, too.
        if group.creator_actor_dead and is_made_by_trial(group):
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def is_made_by_trial(group: Any) -> bool:
    """True of the group for a running trial's workers, false of one for a trial itself, which the driver makes."""
    return bool(group.creator_actor_id.strip(b"\xff"))


def waiting_groups() -> list[Any]:
    """The placement groups of this driver's job that wait for room: for a trial, or for a trial's workers."""
    return [group for group in _groups() if group.state in (_State.PENDING, _State.RESCHEDULING)]


def waiting_for_room(actors: Sequence[Any]) -> list[Any]:
    """Those of the running trials' actors that wait for room for their workers."""
    # The actor has made a controller, which has made the group; of the controller's maker only the address is told.
    controllers = [group.creator_actor_id.hex() for group in waiting_groups() if is_made_by_trial(group)]
    makers = [_told(controller).get("OwnerAddress") for controller in controllers]
    return [actor for actor in actors if makers and _told(actor._actor_id.hex()).get("Address") in makers]


@cache
def _told(actor_id: str) -> Any:
    """What Ray knows of an actor that has started, of which neither address nor maker changes any more."""
    return actor_table(actor_id)


def _groups() -> list[Any]:
    """The placement groups of this job that are not removed, with who made them, which no public call tells."""
    job = ray.get_runtime_context().get_job_id()
    channel: Any = init_grpc_channel(ray.get_runtime_context().gcs_address, [("grpc.enable_http_proxy", 0)])
    try:
        stub = gcs_service_pb2_grpc.PlacementGroupInfoGcsServiceStub(channel)
        request = gcs_service_pb2.GetAllPlacementGroupRequest()  # type: ignore[attr-defined]
        groups = stub.GetAllPlacementGroup(request, timeout=_ANSWER_S).placement_group_table_data
    finally:
        channel.close()
    return [group for group in groups if group.state != _State.REMOVED and group.creator_job_id.hex() == job]
