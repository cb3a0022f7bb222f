"""A run's state as a value: what is saved, restored and compared."""

import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from inflora.errors import UserError
from inflora.files import read_regular, remove_torn, write_atomically
from inflora.metrics import Evaluation, metrics_after

MANIFEST = "state.json"
"""The file that says which of those beside it make a state, written last."""


class StateError(UserError):
    """A saved state is missing, damaged, or belongs to another run."""


_Share = Annotated[float, Field(ge=0, le=1)]


class DataFacts(BaseModel):
    """Facts of the data that a model needs where its dataset is not: the meaning of its outputs, how images were read.

    ``class_of`` has an entry for every output of the whole stream: the class, a place in ``classes``, that it means.
    ``raw``: images were stored as arrays of ``channels`` channels; otherwise as files, read as RGB. ``brightness``: the
    least and the greatest mean pixel (0 black, 1 white) of some training images. ``content_hash`` is the store's,
    ``split_hash`` that of the division into training and validation images. Older versions wrote down neither.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    classes: tuple[str, ...]
    class_of: tuple[int, ...]
    channels: int
    raw: bool
    brightness: tuple[_Share, _Share] | None = None
    content_hash: str | None = None
    split_hash: str | None = None

    @model_validator(mode="after")
    def _grey_or_rgb(self) -> "DataFacts":
        if self.channels not in ((1, 3) if self.raw else (3,)):
            raise ValueError(f"channels must be 3, or 1 of images that were stored as arrays, got {self.channels}")
        return self


_GROUPS = ("model", "adapter", "classifier", "probes")


class RunState(NamedTuple):
    """A run after some of its tasks.

    ``model`` holds all that an adapter has changed of the backbone, ``adapter`` and ``classifier`` what those remember,
    ``probes`` a few features of every task's images when it had just been learnt. Random numbers need no state: each
    task draws from generators of its own. ``diagnostics`` are the numbers known after each task besides the
    evaluations. ``data`` says what the outputs mean.
    """

    config_hash: str
    backbone_hash: str
    evaluate_on: str
    tasks: int
    evaluations: tuple[Evaluation, ...] = ()
    model: dict[str, Tensor] = {}
    adapter: dict[str, Tensor] = {}
    classifier: dict[str, Tensor] = {}
    probes: dict[str, Tensor] = {}
    diagnostics: tuple[dict[str, float], ...] = ()
    data: DataFacts | None = None

    @property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Its tensors by group."""
        return {group: getattr(self, group) for group in _GROUPS}

    def metrics(self, tasks_done: int) -> dict[str, float]:
        """Everything known after the first ``tasks_done`` tasks, by metric name."""
        return metrics_after(self.evaluations[:tasks_done], self.tasks) | self.diagnostics[tasks_done - 1]

    @property
    def tasks_done(self) -> int:
        """The number of tasks that have been learnt."""
        return len(self.evaluations)

    @property
    def is_complete(self) -> bool:
        """True when every task of the stream has been learnt."""
        return self.tasks_done == self.tasks


class _Facts(BaseModel):
    """A state without its tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    config_hash: str
    backbone_hash: str
    evaluate_on: str
    tasks: PositiveInt
    evaluations: tuple[Evaluation, ...]
    diagnostics: tuple[dict[str, FiniteFloat], ...]
    data: DataFacts | None

    @model_validator(mode="after")
    def _one_of_each_task(self) -> "_Facts":
        """After every task there is an evaluation on all tasks so far, and there are diagnostics."""
        seen = [len(evaluation) for evaluation in self.evaluations]
        if seen != [task + 1 for task in range(len(seen))] or len(self.diagnostics) != len(seen):
            raise ValueError(f"evaluations on {seen} tasks and {len(self.diagnostics)} diagnostics are of no run")
        if len(seen) > self.tasks:
            raise ValueError(f"{len(seen)} of {self.tasks} tasks cannot have been learnt")
        return self


_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Manifest(BaseModel):
    """A state without its tensors: ``tensors`` are the hashes of the files that hold them, which are named by them.

    ``sha256`` is the hash of the manifest's own content.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    facts: _Facts
    tensors: tuple[_Sha256, ...]
    sha256: _Sha256


def save_state(state: RunState, folder: Path) -> None:
    """Write ``state`` into ``folder``; a reader sees the state before or the state after, never a mixture.

    The tensors go to files named by their content, then one rename makes the manifest point to them. Those that the
    state before has as well are not written again.

    Raises:
        FloatingPointError: The run has gone astray: there is nothing worth keeping.
    """
    facts = _finite_facts(state)
    folder.mkdir(parents=True, exist_ok=True)
    there, tensors = _tensors_in(folder), []
    for part in _parts(state):
        content = save(part)
        tensors.append(_sha256(content))
        if tensors[-1] not in there:
            write_atomically(_tensors_file(folder, tensors[-1]), content)
    manifest = _Manifest(facts=facts, tensors=tuple(tensors), sha256=_sealed(facts, tensors))
    write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=2, exclude_unset=True).encode())
    for old in set(folder.glob("tensors-*.safetensors")) - {_tensors_file(folder, sha256) for sha256 in tensors}:
        old.unlink(missing_ok=True)
    remove_torn(folder, "tensors-*.safetensors")


def load_state(folder: Path) -> RunState:
    """The state saved in ``folder``.

    Raises:
        StateError: Nothing is saved there, or not what its manifest says.
    """
    manifest = _read_manifest(folder)
    tensors: dict[str, Tensor] = {}
    for sha256 in manifest.tensors:
        file = _tensors_file(folder, sha256)
        content = _read_regular(file)
        if _sha256(content) != sha256:
            raise StateError(f"{file} is damaged: its content does not match its hash")
        tensors |= _unpacked(file, content)
    groups: dict[str, Any] = {group: _with_prefix(tensors, f"{group}/") for group in _GROUPS}
    return RunState(**dict(manifest.facts), **groups)


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _finite_facts(state: RunState) -> _Facts:
    """Describe a state whose numbers are all finite."""
    every = {f"{group}/{name}": tensor for group, tensors in state.tensors.items() for name, tensor in tensors.items()}
    strange = [name for name, tensor in every.items() if not tensor.isfinite().all()]
    strange += [name for known in state.diagnostics for name, value in known.items() if not math.isfinite(value)]
    if strange:
        raise FloatingPointError(
            f"{strange[0]} is not finite after task {state.tasks_done - 1}, so nothing is kept of it; "
            "try a smaller optim.lr"
        )
    return _Facts.model_validate(state._asdict(), extra="ignore")


def _unpacked(file: Path, content: bytes) -> dict[str, Tensor]:
    """The tensors of a file.

    Copies lie in memory as computed tensors do: products round otherwise where they are not aligned.
    """
    try:
        return {name: tensor.clone() for name, tensor in load(content).items()}
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # the header may say anything
        raise StateError(f"{file} is damaged: {' '.join(str(error).split())[:200]}") from None


def _parts(state: RunState) -> Iterator[dict[str, Tensor]]:
    """The tensors of each file: one for each task that tensors are named after (``.../<task>``), one for all others.

    The former stay as they are when the task has been learnt, most of the latter change with every task.
    """
    parts: dict[str | None, dict[str, Tensor]] = {}
    for group, tensors in state.tensors.items():
        for name, tensor in tensors.items():
            task = re.search(r"/(\d+)$", name)
            parts.setdefault(task and task[1], {})[f"{group}/{name}"] = tensor.contiguous()
    yield from parts.values()


def _read_manifest(folder: Path) -> _Manifest:
    """Raises StateError where there is none, or none that is whole."""
    path = folder / MANIFEST
    if not has_state(folder):
        raise StateError(f"no saved state in {folder}")
    try:
        manifest = _Manifest.model_validate_json(_read_regular(path))
        seal = _sealed(manifest.facts, manifest.tensors)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))[:80] or "content"
        raise StateError(f"{path} is damaged or of another version: {where}: {first['msg'][:200]}") from None
    if manifest.sha256 != seal:
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
    # Fields that an older version did not write do not count.
    return _sha256("\n".join((facts.model_dump_json(exclude_unset=True), *tensors)).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def of_folder(folder: Path) -> Iterator[None]:
    """Say of what is wrong with a state where it lies."""
    try:
        yield
    except StateError as error:
        raise StateError(f"{folder}: {error}") from None


def has_state(folder: Path) -> bool:
    """True when a state has been saved in ``folder``."""
    return os.path.lexists(folder / MANIFEST)


def _read_regular(path: Path) -> bytes:
    """A file's content; StateError where it is none (a pipe would be waited for), or cannot be read."""
    try:
        return read_regular(path)
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}") from None
