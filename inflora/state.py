"""A run's state as a value: what is saved, restored and compared."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load, save
from torch import Tensor

from inflora.metrics import Evaluation, metrics_after

_MANIFEST = "state.json"


class StateError(ValueError):
    """A saved state is missing, damaged, or belongs to another run."""


class DataFacts(BaseModel):
    """What of the data a model needs where its dataset is not: the meaning of its outputs, how images were read.

    ``class_of`` has an entry for every output of the whole stream: the class, a place in ``classes``, that it means.
    ``raw``: images were stored as arrays of ``channels`` channels; otherwise as files, read as RGB.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    classes: tuple[str, ...]
    class_of: tuple[int, ...]
    channels: int
    raw: bool


class RunState(NamedTuple):
    """A run after some of its tasks.

    ``model`` holds what learning has changed, ``method`` what the method remembers, ``probes`` a few features of every
    task's images when it had just been learnt; random numbers need no state, each task draws from generators of its
    own. ``diagnostics`` are what is known after each task besides the evaluations. ``data`` says what the outputs mean.
    """

    config_hash: str
    backbone_hash: str
    evaluate_on: str
    tasks: int
    evaluations: tuple[Evaluation, ...] = ()
    model: dict[str, Tensor] = {}
    method: dict[str, Tensor] = {}
    probes: dict[str, Tensor] = {}
    diagnostics: tuple[dict[str, float], ...] = ()
    data: DataFacts | None = None

    def metrics(self, tasks_done: int) -> dict[str, float]:
        """Everything known after the first ``tasks_done`` tasks, by metric name."""
        return metrics_after(self.evaluations[:tasks_done], self.tasks) | self.diagnostics[tasks_done - 1]

    @property
    def tasks_done(self) -> int:
        """How many tasks have been learnt."""
        return len(self.evaluations)

    @property
    def is_complete(self) -> bool:
        """Whether every task of the stream has been learnt."""
        return self.tasks_done == self.tasks


class _Facts(BaseModel):
    """What a state says besides its tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config_hash: str
    backbone_hash: str
    evaluate_on: str
    tasks: int
    evaluations: tuple[Evaluation, ...]
    diagnostics: tuple[dict[str, float], ...]
    data: DataFacts | None


class _Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    facts: _Facts
    tensors: str
    sha256: str


def _sha256(facts: _Facts, tensors: bytes) -> str:
    return hashlib.sha256(facts.model_dump_json().encode() + tensors).hexdigest()


def save_state(state: RunState, folder: Path) -> None:
    """Write ``state`` into ``folder``; a reader sees the state before or the state after, never a mixture.

    The tensors go to a file named by their content, then one rename makes the manifest point to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups = {"model": state.model, "method": state.method, "probes": state.probes}
    content = save({f"{group}/{name}": t.contiguous() for group, part in groups.items() for name, t in part.items()})
    facts = _Facts.model_validate(state._asdict(), extra="ignore")
    sha256 = _sha256(facts, content)
    tensors = f"tensors-{sha256[:16]}.safetensors"
    write_atomically(folder / tensors, content)
    manifest = _Manifest(facts=facts, tensors=tensors, sha256=sha256)
    write_atomically(folder / _MANIFEST, manifest.model_dump_json(indent=2).encode())
    for old in folder.glob("tensors-*.safetensors"):
        if old.name != tensors:
            old.unlink(missing_ok=True)


def load_state(folder: Path) -> RunState:
    """The state saved in ``folder``.

    Raises:
        StateError: Nothing is saved there, or not what its manifest says.
    """
    try:
        manifest = _Manifest.model_validate_json((folder / _MANIFEST).read_bytes())
        content = (folder / Path(manifest.tensors).name).read_bytes()
    except OSError as error:
        raise StateError(f"no saved state in {folder}: {error.strerror}") from None
    except ValidationError as error:
        raise StateError(f"{folder / _MANIFEST} is damaged: {error.errors()[0]['msg']}") from None
    if _sha256(manifest.facts, content) != manifest.sha256:
        raise StateError(f"{folder / manifest.tensors} is damaged: its content does not match its hash")
    # Copies lie in memory as computed tensors do: products round otherwise where they are not aligned.
    tensors = {name: tensor.clone() for name, tensor in load(content).items()}
    model, method, probes = (
        {name.removeprefix(group): tensor for name, tensor in tensors.items() if name.startswith(group)}
        for group in ("model/", "method/", "probes/")
    )
    return RunState(**dict(manifest.facts), model=model, method=method, probes=probes)


def has_state(folder: Path) -> bool:
    """Whether a state has been saved in ``folder``."""
    return (folder / _MANIFEST).exists()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
