"""A run's state as a value: what is saved, restored and compared."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load, save
from torch import Tensor

from inflora.errors import UserError
from inflora.metrics import Evaluation, metrics_after

_MANIFEST = "state.json"


class StateError(UserError):
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


_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Manifest(BaseModel):
    """A state without its tensors: ``tensors`` are the hashes of the files that hold them, which are named by them.

    ``sha256`` is the hash of the manifest's own content.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    facts: _Facts
    tensors: tuple[_Sha256, ...]
    sha256: _Sha256


def save_state(state: RunState, folder: Path) -> None:
    """Write ``state`` into ``folder``; a reader sees the state before or the state after, never a mixture.

    The tensors go to files named by their content, then one rename makes the manifest point to them. Those that the
    state before has as well are not written again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there, tensors = _tensors_in(folder), []
    for part in _parts(state):
        content = save(part)
        tensors.append(_sha256(content))
        if tensors[-1] not in there:
            write_atomically(_tensors_file(folder, tensors[-1]), content)
    facts = _Facts.model_validate(state._asdict(), extra="ignore")
    manifest = _Manifest(facts=facts, tensors=tuple(tensors), sha256=_sealed(facts, tensors))
    write_atomically(folder / _MANIFEST, manifest.model_dump_json(indent=2).encode())
    for old in set(folder.glob("tensors-*.safetensors")) - {_tensors_file(folder, sha256) for sha256 in tensors}:
        old.unlink(missing_ok=True)


def load_state(folder: Path) -> RunState:
    """The state saved in ``folder``.

    Raises:
        StateError: Nothing is saved there, or not what its manifest says.
    """
    manifest = _read_manifest(folder)
    tensors: dict[str, Tensor] = {}
    for sha256 in manifest.tensors:
        file = _tensors_file(folder, sha256)
        try:
            content = file.read_bytes()
        except OSError as error:
            raise StateError(f"cannot read {file}: {error.strerror}") from None
        if _sha256(content) != sha256:
            raise StateError(f"{file} is damaged: its content does not match its hash")
        # Copies lie in memory as computed tensors do: products round otherwise where they are not aligned.
        tensors |= {name: tensor.clone() for name, tensor in load(content).items()}
    model, method, probes = (
        {name.removeprefix(group): tensor for name, tensor in tensors.items() if name.startswith(group)}
        for group in ("model/", "method/", "probes/")
    )
    return RunState(**dict(manifest.facts), model=model, method=method, probes=probes)


def _parts(state: RunState) -> Iterator[dict[str, Tensor]]:
    """The tensors of each file: one for each task that tensors are named after (``.../<task>``), one for all others.

    The former stay as they are when the task has been learnt, most of the latter change with every task.
    """
    parts: dict[str | None, dict[str, Tensor]] = {}
    for group, tensors in (("model", state.model), ("method", state.method), ("probes", state.probes)):
        for name, tensor in tensors.items():
            task = re.search(r"/(\d+)$", name)
            parts.setdefault(task and task[1], {})[f"{group}/{name}"] = tensor.contiguous()
    yield from parts.values()


def _read_manifest(folder: Path) -> _Manifest:
    """Raises StateError where there is none, or none that is whole."""
    path = folder / _MANIFEST
    try:
        manifest = _Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise StateError(f"no saved state in {folder}: {error.strerror}") from None
    except ValidationError as error:
        raise StateError(f"{path} is damaged or of another version: {error.errors()[0]['msg']}") from None
    if manifest.sha256 != _sealed(manifest.facts, manifest.tensors):
        raise StateError(f"{path} is damaged: its content does not match its hash")
    return manifest


def _tensors_in(folder: Path) -> set[str]:
    """The hashes of the files of tensors that the state in ``folder`` has, if one is there."""
    try:
        tensors = _read_manifest(folder).tensors
    except StateError:
        return set()
    return {sha256 for sha256 in tensors if _tensors_file(folder, sha256).exists()}


def _tensors_file(folder: Path, sha256: str) -> Path:
    return folder / f"tensors-{sha256[:16]}.safetensors"


def _sealed(facts: _Facts, tensors: Iterable[str]) -> str:
    return _sha256("\n".join((facts.model_dump_json(), *tensors)).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


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
