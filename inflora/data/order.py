"""What is given where a run would draw it: orders of passes, beginnings of classifiers, features to align them on.

For comparing a run number by number with another implementation's (docs/fidelity.md). All are safetensors files:
``data.order`` holds ``<task>/<pass>`` -> numbers of images in the stored training split, one tensor for each pass
("covariance-before", "train-0", "train-1"..., "covariance-after"); ``optim.head_init`` holds ``<task>.weight`` and
``<task>.bias``; ``method.classifier_alignment.draws`` holds ``<task>/features-<epoch>`` and ``<task>/classes-<epoch>``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from inflora.config import AlignmentSettings, ConfigError, RunConfig, cut
from inflora.data.stream import Stream
from inflora.files import require_regular


class Given(NamedTuple):
    """The tensors of the files that a config names; None where the run draws."""

    orders: dict[str, Tensor] | None = None
    heads: dict[str, Tensor] | None = None
    draws: dict[str, Tensor] | None = None

    @classmethod
    def of(cls, config: RunConfig) -> "Given":
        """Raises ConfigError where a file is missing or no safetensors file."""
        heads = config.optim.head_init
        return cls(
            _read(config.data.order, "data.order"),
            _read(heads if isinstance(heads, Path) else None, "optim.head_init"),
            _read(_alignment(config).draws, "method.classifier_alignment.draws"),
        )

    def check(self, config: RunConfig, stream: Stream, width: int, passes: Sequence[str]) -> None:
        """Raise ConfigError unless all is there that the run will ask for; ``passes``: besides the training epochs."""
        for task in stream.tasks:
            if self.orders is not None:
                epochs = range(config.optim.of_task(task.index).epochs)
                for purpose in (*passes, *(f"train-{epoch}" for epoch in epochs)):
                    ordered_rows(self.orders, task.index, purpose, task.train_rows)
            if self.heads is not None:
                given_head(self.heads, task.index, len(task.classes), width)
            if self.draws is not None and task.index:
                for epoch in range(_alignment(config).epochs):
                    drawn_features(self.draws, task.index, epoch, width, task.first_label + len(task.classes))


def _alignment(config: RunConfig) -> AlignmentSettings:
    return getattr(config.method, "classifier_alignment", AlignmentSettings())


def _read(path: Path | None, setting: str) -> dict[str, Tensor] | None:
    """The tensors in the file that ``setting`` names, if it names one.

    Raises:
        ConfigError: It is missing, no safetensors file, or holds numbers that are not finite.
    """
    if path is None:
        return None
    try:
        require_regular(path)
        tensors = load_file(path)
    except (OSError, SafetensorError, KeyError) as error:  # a KeyError: of a type that PyTorch does not have
        raise ConfigError(
            f"cannot read {setting} {cut(path, 200)}: {cut(getattr(error, 'strerror', None) or error, 200)}"
        ) from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ConfigError(f"{setting} {cut(path, 200)} holds numbers that are not finite in {cut(name)}")
    return tensors


def ordered_rows(orders: dict[str, Tensor], task: int, purpose: str, rows: Tensor) -> Tensor:
    """The rows of one pass as ``data.order`` gives them: all of the task's ``rows``, each once.

    Raises:
        ConfigError: The pass is not given, or is not over these rows.
    """
    name = f"{task}/{purpose}"
    if name not in orders:
        raise ConfigError(f"data.order does not give the pass {name}; it gives {', '.join(sorted(orders)[:8])}...")
    given = orders[name].to(torch.int64)
    if not torch.equal(given.sort().values, rows.sort().values):
        raise ConfigError(f"data.order must name each of the {len(rows)} images of task {task} once in {name}")
    return given


def given_head(heads: dict[str, Tensor], task: int, classes: int, width: int) -> dict[str, Tensor]:
    """One task's ``weight`` (C x ``width``) and ``bias`` (C) as ``optim.head_init`` gives them.

    Raises:
        ConfigError: They are not given, or are of other sizes.
    """
    found = {name: heads.get(f"{task}.{name}") for name in ("weight", "bias")}
    head = {name: tensor for name, tensor in found.items() if tensor is not None}
    if [tuple(tensor.shape) for tensor in head.values()] != [(classes, width), (classes,)]:
        raise ConfigError(
            f"optim.head_init must hold {task}.weight ({classes}, {width}) and {task}.bias, it holds "
            + ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(heads.items()))[:200]
        )
    return head


def drawn_features(draws: dict[str, Tensor], task: int, epoch: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    """One epoch's features (N x ``width``) and their classes (N), of the ``classes`` seen, in order of learning.

    Raises:
        ConfigError: They are not given, or are not such tensors.
    """
    names = f"{task}/features-{epoch}", f"{task}/classes-{epoch}"
    if missing := [name for name in names if name not in draws]:
        raise ConfigError(
            f"method.classifier_alignment.draws must hold {missing[0]}; it holds {', '.join(sorted(draws)[:8])}..."
        )
    features, labels = draws[names[0]].float(), draws[names[1]].to(torch.int64)
    if features.shape != (labels.numel(), width) or not torch.isin(labels, torch.arange(classes)).all():
        raise ConfigError(
            f"method.classifier_alignment.draws must hold in {names[0]} rows of {width} numbers and in {names[1]} as "
            f"many classes below {classes}, got {tuple(features.shape)} and {tuple(labels.shape)}"
        )
    return features, labels
