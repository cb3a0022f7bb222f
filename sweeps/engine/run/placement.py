"""What runs a trial, and the place that it asks the cluster for."""

import time
from collections.abc import Callable
from typing import Any

from ray import tune

from sweeps.engine.run.cluster import DRIVER, HEAD, has_drivers
from sweeps.engine.run.driver import train_driver
from sweeps.engine.run.nodes import elsewhere
from sweeps.engine.run.trial import inline_trial
from sweeps.engine.space.spec import Sweep


def placed_trainable(sweep: Sweep, trials: str) -> Any:
    """The trainable of a sweep's executor, with the resources that each trial's settings ask for.

    ``trials`` is the address of the folder of their states.
    """
    if sweep.executor == "inline":
        return tune.with_resources(_after_pause(inline_trial(sweep.resources, trials)), _place_inline(sweep))
    beside = has_drivers()
    trainable = train_driver(sweep.resources, sweep.base.device, trials, beside=beside)
    return tune.with_resources(_after_pause(trainable), _place_of_driver(beside=beside))


def _after_pause(trainable: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """The same, after the pause that the trial's settings ask for."""

    def trial(settings: dict[str, Any]) -> None:
        time.sleep(settings["pause_s"])
        trainable(settings)

    return trial


def _place_inline(sweep: Sweep) -> Any:
    """Room for the worker itself: the trial learns inside of Tune's actor."""
    cpus = sweep.resources.cpus_per_worker
    return lambda settings: tune.PlacementGroupFactory(
        [{"CPU": cpus, "GPU": settings["gpus"]}], bundle_label_selector=[elsewhere(settings["avoid"])]
    )


def _place_of_driver(*, beside: bool) -> Any:
    """A driver's room, ``beside`` its workers or on the head; one that asked for CPUs would starve its own workers."""
    room: dict[str, float] = {DRIVER: 1} if beside else {HEAD: 0.001}
    return lambda settings: tune.PlacementGroupFactory(
        [room], bundle_label_selector=[elsewhere(settings["avoid"]) if beside else {}]
    )
