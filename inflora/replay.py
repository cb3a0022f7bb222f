"""Recorded orders, beginnings and features in the place of drawn ones: to compare runs (docs/fidelity.md).

All are safetensors files: ``replay.orders`` holds ``<task>/<pass>`` -> numbers of images in the stored training split,
one tensor for each pass ("covariance-before", "train-0", "train-1"..., "covariance-after"); ``replay.heads`` holds
``<task>.weight`` (C x D) and ``<task>.bias`` (C); ``replay.draws`` holds ``<task>/features-<epoch>`` (N x D) and
``<task>/classes-<epoch>`` (N, counted in order of learning), for the tasks from 1.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from inflora.adapters import Adapter
from inflora.classifiers import Classifier
from inflora.config import AlignedSettings, ConfigError, RunConfig, cut
from inflora.data.stream import Stream, Task
from inflora.draws import Draws
from inflora.files import require_regular
from inflora.gaussians import Gaussians


class Replay(Draws):
    """The choices in a config's files; those of which they do not speak are drawn.

    Raises:
        ConfigError: A file is missing, or is no safetensors file of finite numbers.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config.seed)
        files = config.replay
        self.orders = _read(files.orders, "replay.orders")
        self.heads = _read(files.heads, "replay.heads")
        self.features = _read(files.draws, "replay.draws")

    def order(self, task: Task, purpose: str, generator: torch.Generator) -> Tensor:
        """The rows of one pass as they are recorded."""
        if not self.orders:
            return super().order(task, purpose, generator)
        return self.orders[f"{task.index}/{purpose}"].to(torch.int64)

    def begin_head(self, head: nn.Linear, task: int, init: str) -> None:
        """Give a task's classifier its recorded beginning."""
        if not self.heads:
            return super().begin_head(head, task, init)
        head.load_state_dict({name: self.heads[f"{task}.{name}"] for name in ("weight", "bias")})
        return None

    def class_features(
        self, gaussians: Sequence[Gaussians], classes_C: Tensor, samples: int, task: int, epoch: int
    ) -> tuple[Tensor, Tensor]:
        """One epoch's features and classes in the order in which they are recorded."""
        if not self.features:
            return super().class_features(gaussians, classes_C, samples, task, epoch)
        features_ND, classes_N = (self.features[f"{task}/{part}-{epoch}"] for part in ("features", "classes"))
        return features_ND.float().to(classes_C.device), classes_N.to(classes_C.device, torch.int64)

    def check(self, config: RunConfig, stream: Stream, adapter: Adapter[Any], classifier: Classifier[Any]) -> None:
        """Raise ConfigError unless the files hold all that the run will ask for, and nothing else."""
        for setting, recorded, check in (
            ("replay.orders", self.orders, _check_orders),
            ("replay.heads", self.heads, _check_heads),
            ("replay.draws", self.features, _check_features),
        ):
            if recorded:
                asked = check(recorded, config, stream, adapter, classifier)
                # A file that holds more is of another run: its numbers would be compared with this one's.
                if foreign := sorted(recorded.keys() - set(asked)):
                    raise ConfigError(f"{setting} holds {cut(foreign[0])}, which this run does not ask for")


def _check_orders(
    recorded: dict[str, Tensor], config: RunConfig, stream: Stream, adapter: Adapter[Any], classifier: Classifier[Any]
) -> list[str]:
    """Every pass is over all images of its task, each once."""
    asked = []
    for task in stream.tasks:
        adapts = adapter.adapts(task.index)
        trains = adapts or classifier.trained_alone
        epochs = config.optim.of_task(task.index).epochs if trains else 0
        for purpose in (*(adapter.passes if adapts else ()), *(f"train-{epoch}" for epoch in range(epochs))):
            asked.append(f"{task.index}/{purpose}")
            rows = _recorded(recorded, asked[-1], "replay.orders").to(torch.int64)
            if not torch.equal(rows.sort().values, task.train_rows.sort().values):
                raise ConfigError(
                    f"replay.orders must name each of the {len(task.train_rows)} images of task {task.index} once "
                    f"in {asked[-1]}"
                )
    return asked


def _check_heads(
    recorded: dict[str, Tensor], config: RunConfig, stream: Stream, adapter: Adapter[Any], classifier: Classifier[Any]
) -> list[str]:
    """Every task's classifier has its weight and bias."""
    asked = []
    for task in stream.tasks:
        classes = len(task.classes)
        for name, shape in (("weight", (classes, classifier.width)), ("bias", (classes,))):
            asked.append(f"{task.index}.{name}")
            found = _recorded(recorded, asked[-1], "replay.heads")
            if tuple(found.shape) != shape:
                raise ConfigError(f"replay.heads must hold {asked[-1]} {shape}, got {tuple(found.shape)}")
    return asked


def _check_features(
    recorded: dict[str, Tensor], config: RunConfig, stream: Stream, adapter: Adapter[Any], classifier: Classifier[Any]
) -> list[str]:
    """Every epoch of alignment has features of the classes seen by then."""
    asked: list[str] = []
    for task in stream.tasks[1:]:
        classes = task.first_label + len(task.classes)
        with_images = torch.cat(
            [stream.train.labels[old.train_rows] for old in stream.tasks[: task.index + 1]]
        ).unique()
        for epoch in range(cast(AlignedSettings, config.classifier).epochs_of(len(with_images))):
            names = f"{task.index}/features-{epoch}", f"{task.index}/classes-{epoch}"
            features, labels = (_recorded(recorded, name, "replay.draws") for name in names)
            asked += names
            shape = (labels.numel(), classifier.width)
            fits = labels.dim() == 1 and not labels.is_floating_point() and features.shape == shape
            if not fits or not torch.isin(labels, torch.arange(classes)).all():
                raise ConfigError(
                    f"replay.draws must hold in {names[0]} rows of {shape[1]} numbers and in {names[1]} as many "
                    f"classes below {classes}, got {tuple(features.shape)} and {tuple(labels.shape)}"
                )
    return asked


def _recorded(recorded: dict[str, Tensor], name: str, setting: str) -> Tensor:
    if name not in recorded:
        raise ConfigError(f"{setting} must hold {name}; it holds {_listed(recorded)}")
    return recorded[name]


def _listed(names: Collection[str]) -> str:
    return cut(", ".join(sorted(names)), 200)


def _read(path: Path | None, setting: str) -> dict[str, Tensor]:
    """The tensors in the file that ``setting`` names, if it names one.

    Raises:
        ConfigError: It is missing, no safetensors file, empty, or holds numbers that are not finite.
    """
    if path is None:
        return {}
    try:
        require_regular(path)
        tensors = load_file(path)
    except (OSError, SafetensorError, KeyError) as error:  # a KeyError: of a type that PyTorch does not have
        raise ConfigError(
            f"cannot read {setting} {cut(path, 200)}: {cut(getattr(error, 'strerror', None) or error, 200)}"
        ) from None
    if not tensors:
        raise ConfigError(f"{setting} {cut(path, 200)} holds no tensors")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ConfigError(f"{setting} {cut(path, 200)} holds numbers that are not finite in {cut(name)}")
    return tensors
