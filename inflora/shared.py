"""What several runs have in common, computed once: tensors in a folder, under a hash of all that they depend on.

The first task is where runs agree: before it the model is the backbone as it came, and its training does not feel
what is only remembered for later (``AFTER_FIRST_TASK``). What is found has the bits that would have been computed.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from inflora import distributed
from inflora.config import AFTER_FIRST_TASK, RunConfig


def keys_of(config: RunConfig, origin: str) -> dict[str, str]:
    """All that the first task's model depends on "before" and "after" its training; ``origin``: data and backbone."""
    return {"before": _untouched_key(config, origin), "after": _trained_key(config, origin)}


def _untouched_key(config: RunConfig, origin: str) -> str:
    layers = {name: getattr(config.method, name, None) for name in ("blocks", "targets")}
    return _hash(config, origin, layers | {"batch_size": config.optim.batch_size})


def _trained_key(config: RunConfig, origin: str) -> str:
    felt_later = {name.split(".")[0] for name in AFTER_FIRST_TASK}
    method = config.method.model_dump(mode="json", exclude=felt_later)
    optim = config.optim.of_task(0).model_dump(mode="json", exclude={"first_task"})
    return _hash(config, origin, {"method": method, "optim": optim})


def _hash(config: RunConfig, origin: str, depends_on: dict[str, Any]) -> str:
    cuda = config.device != "cpu" and torch.cuda.is_available()
    facts = {
        **depends_on,
        "version": version("inflora-sweeps"),
        "data": config.data.model_dump(mode="json", exclude={"root"}),
        "origin": origin,
        "seed": config.seed,
        # Rounding differs with these.
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
        "workers": distributed.world_size(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class Shared:
    """A folder of results that any number of runs read and write at the same time; None shares nothing.

    ``saved_s`` is the time that computing what was found here has once taken.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.saved_s = 0.0

    def once(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What ``compute`` gives, on the CPU if it was found; all workers find it or none does."""
        if self.folder is None:
            return compute()
        path = self.folder / f"{key}.safetensors"
        found = _read(path)
        everywhere = int(distributed.all_sum(torch.tensor(0 if found is None else 1))) == distributed.world_size()
        if found is not None and everywhere:
            tensors, seconds = found
            self.saved_s += seconds
            return tensors
        start = time.perf_counter()
        tensors = compute()
        if distributed.rank() == 0:
            _write(path, tensors, time.perf_counter() - start)
        return tensors


def _read(path: Path) -> tuple[dict[str, Tensor], float] | None:
    """What is there and how long it took; None where nothing is, or not all of it."""
    try:
        with safe_open(path, framework="pt") as file:
            # A copy lies in memory as a computed tensor does: products round otherwise where it is not aligned.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, float(file.metadata()["seconds"])  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def _write(path: Path, tensors: dict[str, Tensor], seconds: float) -> None:
    """A file of its own, then one rename: whoever reads sees all or nothing, and the last of several writers stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
    os.close(descriptor)
    save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, temporary, {"seconds": repr(seconds)})
    Path(temporary).replace(path)
