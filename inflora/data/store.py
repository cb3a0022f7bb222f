"""Images on disk: Arrow IPC files, memory-mapped, with a manifest that says what must be in them.

A store is a folder ``<root>/<dataset>`` with ``manifest.json`` and shards ``train-00000.arrow``, ``test-00000.arrow`` …
Each split is opened by itself: whoever opens "train" never touches the test images.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from inflora.data.pixels import FilePixels, Pixels, RawPixels
from inflora.errors import UserError

Split = Literal["train", "test"]
Form = Literal["raw", "encoded", "decoded"]
"""How a store keeps images.

raw: uint8 arrays, all of one size, one shard per split: mapped as one tensor, nothing is decoded (CIFAR, digits).
encoded: the dataset's own JPEG or PNG files: small, exact, decoded at every use.
decoded: uint8 arrays with a bounded shorter side: decoded once, several times larger on disk, faster to read.
"""
FORMAT = 2


class DataError(UserError):
    """A store or its source is missing, damaged or of another version; the message says what to do."""


class Shard(BaseModel):
    """One file of a split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    images: int
    sha256: str


class SplitManifest(BaseModel):
    """What one split holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    per_class: list[int]
    shards: list[Shard]

    @property
    def images(self) -> int:
        """How many images the split has."""
        return sum(shard.images for shard in self.shards)

    @property
    def content_hash(self) -> str:
        """Identity of the split's images and labels."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()[:16]


class Manifest(BaseModel):
    """What a store holds; written last, so a folder without it is not a store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    dataset: str
    source: str
    classes: list[str]
    domains: list[str]
    form: Form
    channels: int
    whole: bool = False  # as many classes and images as the dataset officially has
    splits: dict[Split, SplitManifest]

    @property
    def content_hash(self) -> str:
        """Identity of the images and labels, whatever the store is called and wherever it lies."""
        splits = [self.splits[split].content_hash for split in sorted(self.splits)]
        return hashlib.sha256("".join(splits).encode()).hexdigest()[:16]


class _Format(BaseModel):
    """The one field that every version's manifest has."""

    format: int


class Images(NamedTuple):
    """Images of one split: where their pixels come from, ``labels`` int64 (N) and ``domains`` int64 (N)."""

    pixels: Pixels
    labels: Tensor
    domains: Tensor


class Rows(NamedTuple):
    """Images about to be written as one shard."""

    images: Sequence[bytes | np.ndarray]
    sizes: np.ndarray  # (N, 2) height and width
    labels: np.ndarray  # (N)
    domains: np.ndarray  # (N)


def default_root() -> Path:
    """Where stores live unless ``data.root`` says otherwise."""
    return Path(os.environ.get("INFLORA_DATA", Path.home() / ".cache" / "inflora" / "data"))


def write_shard(path: Path, rows: Rows, form: Form) -> Shard:
    """Write one Arrow file; the same rows give the same bytes."""
    if form == "raw":
        flat = np.ascontiguousarray(rows.images, dtype=np.uint8).reshape(len(rows.labels), -1)
        images = pa.FixedSizeBinaryArray.from_buffers(pa.binary(flat.shape[1]), len(flat), [None, pa.py_buffer(flat)])
    else:
        images = pa.array(map(bytes, rows.images), pa.large_binary())
    columns = {
        "image": images,
        "height": pa.array(rows.sizes[:, 0], pa.int32()),
        "width": pa.array(rows.sizes[:, 1], pa.int32()),
        "label": pa.array(rows.labels, pa.int64()),
        "domain": pa.array(rows.domains, pa.int64()),
    }
    batch = pa.record_batch(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return Shard(file=path.name, images=len(rows.labels), sha256=_file_hash(path))


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store.

    Raises:
        DataError: No store is there, or one that this version cannot read.
    """
    path = folder / "manifest.json"
    try:
        content = path.read_bytes()
        written_by = _Format.model_validate_json(content).format
        if written_by != FORMAT:
            raise DataError(
                f"{folder} has store format {written_by}, expected {FORMAT}; remove it and prepare it again"
            )
        return Manifest.model_validate_json(content)
    except OSError as error:
        raise DataError(f"no dataset store in {folder}: {path.name}: {error.strerror}") from None
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise DataError(f"{path} is damaged: {reason}; remove {folder} and prepare it again") from None


def open_split(folder: Path, split: Split) -> Images:
    """The images of one split, memory-mapped: nothing is read before it is used.

    Raises:
        DataError: The split is missing or does not hold what the manifest says.
    """
    manifest = read_manifest(folder)
    tables = [_open_shard(folder, shard) for shard in manifest.splits[split].shards]
    labels, domains, heights, widths = (
        torch.from_numpy(np.concatenate([table.column(name).to_numpy() for table in tables]))
        for name in ("label", "domain", "height", "width")
    )
    columns = [table.column("image").chunk(0) for table in tables]
    pixels: Pixels
    if manifest.form == "raw":
        pixels = RawPixels.mapped(columns[0], int(heights[0]), int(widths[0]), manifest.channels)
    else:
        pixels = FilePixels(columns, torch.stack([heights, widths], 1), encoded=manifest.form == "encoded")
    return Images(pixels, labels, domains)


def _open_shard(folder: Path, shard: Shard) -> pa.Table:
    path = folder / shard.file
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"cannot read {path}: {' '.join(str(error).split())}; remove {folder} and prepare again"
        ) from None
    if table.num_rows != shard.images:
        raise DataError(f"{path} holds {table.num_rows} images, its manifest says {shard.images}; prepare it again")
    return table


def verify_split(folder: Path, split: Split) -> None:
    """Check a split's files against the hashes in the manifest.

    Raises:
        DataError: A file has changed since it was written.
    """
    for shard in read_manifest(folder).splits[split].shards:
        path = folder / shard.file
        try:
            found = _file_hash(path)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; remove {folder} and prepare it again") from None
        if found != shard.sha256:
            raise DataError(f"{path} has changed since it was prepared; remove {folder} and prepare it again")
