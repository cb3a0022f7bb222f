"""What several runs have in common, computed once: tensors in a shared place, under a hash of all they depend on.

The first task is where runs agree: before it the model is the backbone as it came, and its training does not feel
what is only remembered for later (``AFTER_FIRST_TASK``). What is found has the bits that would have been computed.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from inflora import distributed
from inflora.config import AFTER_FIRST_TASK, RunConfig
from inflora.storage import SharedFolder

_SECONDS = "computed in seconds"
"""The tensor beside the others that says how long they took."""

_DIGEST = 32  # bytes of a SHA-256

logger = logging.getLogger(__name__)


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
    """A place of results that any number of runs read and write at the same time; None shares nothing.

    ``saved_s`` is the time that computing what was found here has once taken. A place that cannot be reached costs
    time and nothing else: what it would have had is computed.
    """

    def __init__(self, place: SharedFolder | None = None) -> None:
        self.place = place
        self.saved_s = 0.0

    def once(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What ``compute`` gives, on the CPU if it was found; all workers find it or none does."""
        if self.place is None:
            return compute()
        name = f"{key}.sealed"
        found = _read(self.place, name)
        if distributed.everywhere(found is not None) and found is not None:
            self.saved_s += found.pop(_SECONDS).item()
            return found
        start = time.perf_counter()
        tensors = compute()
        if distributed.rank() == 0:
            _write(self.place, name, tensors, time.perf_counter() - start)
        return tensors


def _read(place: SharedFolder, name: str) -> dict[str, Tensor] | None:
    """What is there, with how long it took; None where nothing is, or not all of it."""
    try:
        content = place.read(name)
        found = {} if content is None else load(_unsealed(content))
    except (OSError, SafetensorError, ValueError) as error:
        logger.warning("%s in %s cannot be read and is computed again: %s", name, place.address, error)
        return None
    # Copies lie in memory as computed tensors do: products round otherwise where they are not aligned.
    return {key: tensor.clone() for key, tensor in found.items()} if _SECONDS in found else None


def _write(place: SharedFolder, name: str, tensors: dict[str, Tensor], seconds: float) -> None:
    kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:
        content = save(kept | {_SECONDS: torch.tensor(seconds, dtype=torch.float64)})
        place.write(name, hashlib.sha256(content).digest() + content)
    except OSError as error:
        logger.warning("%s could not be kept in %s: %s", name, place.address, error)


def _unsealed(content: bytes) -> bytes:
    """What follows a file's hash: a flipped bit would be another number, and another run."""
    digest, rest = content[:_DIGEST], content[_DIGEST:]
    if hashlib.sha256(rest).digest() != digest:
        raise ValueError("its content does not match its hash")
    return rest
