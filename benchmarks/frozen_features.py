"""What a frozen backbone makes of a batch, computed once for all trainings that see the batch.

Trainings of a stream with the same class order and seed see the same batches. The clock does not notice: what was
spared is on it.
"""

import hashlib
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from inflora.files import write_atomically
from inflora.model import ContinualModel
from inflora.prompts import PrefixAttention


class FrozenFeatures:
    """Features of batches, by the hash of their images, kept in files that begin with ``path``; without one, nothing.

    To be used by one model. A file for each part of a model that is frozen, as their kernels round in their own ways.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.spared = path, 0.0
        self._parts: dict[Path, dict[bytes, tuple[Tensor, float]]] = {}

    def clock(self) -> float:
        """Seconds of the processor, with those that were spared: another program on the machine does not count."""
        return time.process_time() + self.spared

    def watch(self, model: ContinualModel, adapts: bool) -> None:
        """Remember what the frozen parts of the model say, in the place of asking them again."""
        for name, module in frozen_parts(model, adapts) if self.path else ():
            assert self.path is not None
            file = self.path.with_name(f"{self.path.name}-{name}.npz")
            self._parts[file] = read(file)
            object.__setattr__(module, "forward", self._remembering(module, self._parts[file]))

    def keep(self) -> None:
        """Write what is known by now."""
        for file, known in self._parts.items():
            write(known, file)

    def _remembering(self, module: nn.Module, known: dict[bytes, tuple[Tensor, float]]) -> Callable[[Tensor], Tensor]:
        compute: Callable[[Tensor], Tensor] = module.forward
        promptable = [layer for layer in module.modules() if isinstance(layer, PrefixAttention)]

        def forward(images: Tensor) -> Tensor:
            if any(layer.prefix is not None for layer in promptable):
                return compute(images)
            key = hashlib.blake2b(images.numpy().tobytes(), digest_size=16).digest()
            if key in known:
                features, seconds = known[key]
                self.spared += seconds
                return features
            start = time.process_time()
            with torch.no_grad():
                features = compute(images)
            known[key] = features, time.process_time() - start
            return features

        return forward


def frozen_parts(model: ContinualModel, adapts: bool) -> Iterator[tuple[str, Any]]:
    """The backbones of a model that say the same of an image for ever, but for prompts, which must be looked for."""
    if model.frozen is not None:
        yield "beside", model.frozen
    if model.prompts is not None:
        yield "prompted", model.backbone
    elif not adapts:
        yield "alone", model.backbone


def read(file: Path) -> dict[bytes, tuple[Tensor, float]]:
    """What ``write`` has written; nothing where there is no file."""
    if not file.exists():
        return {}
    with np.load(file) as kept:
        parts = torch.from_numpy(kept["features"]).split(kept["sizes"].tolist())
        keys = [bytes(key) for key in kept["keys"]]
        return dict(zip(keys, zip(parts, kept["seconds"].tolist(), strict=True), strict=True))


def write(known: dict[bytes, tuple[Tensor, float]], file: Path) -> None:
    """Keep the features of all batches as one array."""
    file.parent.mkdir(parents=True, exist_ok=True)
    features, seconds = zip(*known.values(), strict=True)
    out = io.BytesIO()
    np.savez(
        out,
        keys=np.array([list(key) for key in known], np.uint8),
        sizes=[len(part) for part in features],
        features=torch.cat(features).numpy(),
        seconds=seconds,
    )
    write_atomically(file, out.getvalue())
