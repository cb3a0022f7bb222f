"""The trainable that Tune calls to run a trial through Ray Train.

Tune's process, Train's controller and the worker start one after another, so the first two must not wait for what only
the last one needs: with one worker, neither imports torch.
"""

import gc
import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError
from ray.tune.integration.ray_train import TuneReportCallback

from inflora.storage import SharedFolder
from sweeps.engine.run.nodes import elsewhere, here
from sweeps.engine.space.spec import Resources


class Trainer(DataParallelTrainer):
    """Train's own, without its cleaner of placement groups: a process on the head for every trial.

    What a dead trial has asked for is removed by the sweep's own watch, which asks no dashboard for it.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [each for each in callbacks if not isinstance(each, PlacementGroupCleanerCallback)]


def train_driver(resources: Resources, device: str, storage: str, *, beside: bool) -> Callable[[dict[str, Any]], None]:
    """The trainable that starts a Ray Train run per trial; the same name and storage make it resume by itself.

    ``beside``: a single worker is placed on its driver's own machine, if that has room.
    """

    def train(settings: dict[str, Any], trials: SharedFolder) -> None:
        notice = forget_if_torn(trials, settings["name"])
        needs = {"CPU": resources.cpus_per_worker, "GPU": settings["gpus"]}
        beside_it = here(needs) if beside and resources.workers == 1 else {}
        own = {"threads": resources.cpus_per_worker, "notice": notice, "trials": storage}
        trainer = Trainer(
            _train_worker,
            train_loop_config=settings | own,
            backend_config=worker_backend(resources, device),
            # The types that ray.train shows are those of Train V1; V2, which runs, has these.
            scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]
                num_workers=resources.workers,
                use_gpu=resources.gpus_per_worker > 0,
                resources_per_worker=needs,
                label_selector=beside_it or elsewhere(settings["avoid"]) or None,
            ),
            run_config=ray.train.RunConfig(  # type: ignore[call-arg]
                name=settings["name"],
                storage_path=storage,
                callbacks=[TuneReportCallback()],  # type: ignore[list-item]
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
                failure_config=ray.train.FailureConfig(max_failures=1),
                logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            ),
        )
        try:
            trainer.fit()
        except ControllerError as error:
            # The controller writes the list of checkpoints; what it cannot write now it can when the place is back.
            if isinstance(error.controller_failure, OSError):
                raise error.controller_failure from error
            raise
        except RayActorError:
            trials.require()  # what it reads as it begins: away, that is why
            raise

    def trial(settings: dict[str, Any]) -> None:
        trials = SharedFolder(storage)
        trials.when_there(lambda: train(settings, trials))

    return trial


def forget_if_torn(trials: SharedFolder, name: str) -> str:
    """Discard what Train has kept of a trial if its list of checkpoints is not whole, and say why.

    Train writes that list in place; a driver that is killed just then, or a machine that loses power, leaves a part of
    it. With that, as with a list that names what is gone, every further try would fail: the trial begins anew.
    """
    try:
        content = trials.read(f"{name}/{CHECKPOINT_MANAGER_SNAPSHOT_FILENAME}")
        if content is None:
            return ""
        kept = _CheckpointManagerState.model_validate(json.loads(content))
    except (ValueError, TypeError, RecursionError, OSError) as error:
        if isinstance(error, OSError) and not trials.is_local:
            raise  # a bucket that cannot be reached now is no damage
        problem = "cannot be read"
    else:
        named = [result.checkpoint_dir_name for result in kept.checkpoint_results]
        latest = kept.latest_checkpoint_result
        whole = len(named) == len(kept.checkpoint_report_indices) and set(named) <= trials.folders(name)
        if whole and (latest is None or latest.checkpoint_dir_name in named):
            return ""
        problem = "names some that are gone"
    trials.discard(name)
    return f"the list of its checkpoints {problem}"


class SingleWorkerBackend(Backend):
    """A single worker has nobody to find; its GPU is shown to it as Train's own backend for torch would."""

    share_cuda_visible_devices = True


class SingleWorkerConfig(BackendConfig):
    """Train's way to name a backend."""

    @property
    def backend_cls(self) -> type[Backend]:
        return SingleWorkerBackend


def worker_backend(resources: Resources, device: str) -> BackendConfig:
    """The backend through which a trial's workers find each other: NCCL where they are to train on GPUs of theirs."""
    if resources.workers == 1:
        return SingleWorkerConfig()
    from ray.train.torch import TorchConfig

    return TorchConfig(backend="nccl" if resources.gpus_per_worker and device != "cpu" else "gloo")


def _train_worker(settings: dict[str, Any]) -> None:
    import_trial().train_worker(settings)


def import_trial() -> ModuleType:
    """``sweeps.engine.run.trial``, and with it torch and timm: most of what a worker does before its first step.

    A fifth of that time would be the search for garbage, of which imports leave none.
    """
    gc.disable()
    try:
        from sweeps.engine.run import trial
    finally:
        gc.enable()
    return trial
