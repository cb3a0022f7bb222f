"""Images on disk: one Arrow IPC file per split, memory-mapped, with a manifest that says what must be in it.

A store is a folder ``<root>/<dataset>`` with ``train.arrow``, ``test.arrow`` and ``manifest.json``. Each split is
opened by itself: whoever opens "train" never touches the test images.
"""

import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

Split = Literal["train", "test"]
FORMAT = 1


class DataError(ValueError):
    """A store or its source is missing, damaged or of another version; the message says what to do."""


class SplitManifest(BaseModel):
    """What one split holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    per_class: list[int]
    sha256: str


class Manifest(BaseModel):
    """What a store holds; written last, so a folder without it is not a store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    dataset: str
    source: str
    classes: list[str]
    height: int
    width: int
    channels: int
    splits: dict[Split, SplitManifest]


class _Format(BaseModel):
    """The one field that every version's manifest has."""

    format: int


class Images(NamedTuple):
    """Images of one split: ``pixels`` uint8 (N, H, W, C) and ``labels`` int64 (N)."""

    pixels: Tensor
    labels: Tensor


def default_root() -> Path:
    """Where stores live unless ``data.root`` says otherwise."""
    return Path(os.environ.get("INFLORA_DATA", Path.home() / ".cache" / "inflora" / "data"))


def write_store(
    folder: Path,
    dataset: str,
    source: str,
    classes: Sequence[str],
    splits: Mapping[Split, tuple[np.ndarray, np.ndarray]],
) -> Manifest:
    """Write a store whole or not at all.

    Args:
        folder: Becomes the store; must not be one yet.
        dataset: Its name.
        source: What the images were made from, with its version or hash.
        classes: Class names; a label is a place in this list.
        splits: Split name -> pixels uint8 (N, H, W, C) and labels (N).
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        manifests = {
            name: _write_split(staging / f"{name}.arrow", *data, len(classes)) for name, data in splits.items()
        }
        _, height, width, channels = splits["train"][0].shape
        manifest = Manifest(
            dataset=dataset,
            source=source,
            classes=list(classes),
            height=height,
            width=width,
            channels=channels,
            splits=manifests,
        )
        (staging / "manifest.json").write_text(manifest.model_dump_json(indent=2))
        try:
            staging.rename(folder)
        except OSError:
            # Another process has just finished the same store: theirs stands, if it is the same.
            if read_manifest(folder) != manifest:
                raise DataError(f"{folder} holds another store; remove it to prepare {dataset} again") from None
        return manifest
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_split(path: Path, pixels: np.ndarray, labels: np.ndarray, classes: int) -> SplitManifest:
    flat = np.ascontiguousarray(pixels, dtype=np.uint8).reshape(len(pixels), -1)
    images = pa.FixedSizeBinaryArray.from_buffers(pa.binary(flat.shape[1]), len(flat), [None, pa.py_buffer(flat)])
    batch = pa.record_batch({"image": images, "label": pa.array(labels, pa.int64())})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return SplitManifest(
        images=len(flat), per_class=np.bincount(labels, minlength=classes).tolist(), sha256=_file_hash(path)
    )


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
    """The images of one split, memory-mapped: nothing is read before it is used, nothing is copied.

    Raises:
        DataError: The split is missing or does not hold what the manifest says.
    """
    manifest = read_manifest(folder)
    path = folder / f"{split}.arrow"
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"cannot read {path}: {' '.join(str(error).split())}; remove {folder} and prepare again"
        ) from None
    expected = manifest.splits[split].images
    if table.num_rows != expected:
        raise DataError(f"{path} holds {table.num_rows} images, its manifest says {expected}; prepare it again")
    # The split was written as one batch: its buffer is the mapping itself.
    image_column = table.column("image").chunk(0)
    shape = (expected, manifest.height, manifest.width, manifest.channels)
    pixels = np.frombuffer(image_column.buffers()[1], dtype=np.uint8, count=int(np.prod(shape)))
    with warnings.catch_warnings():
        # The mapping is read-only and torch has no such tensors; nothing here writes to one.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return Images(torch.from_numpy(pixels.reshape(shape)), torch.from_numpy(table.column("label").to_numpy()))


def verify_split(folder: Path, split: Split) -> None:
    """Check a split's file against the hash in its manifest.

    Raises:
        DataError: The file has changed since it was written.
    """
    try:
        found = _file_hash(folder / f"{split}.arrow")
    except OSError as error:
        raise DataError(f"cannot read {folder / split}.arrow: {error.strerror}; prepare it again") from None
    if found != read_manifest(folder).splits[split].sha256:
        raise DataError(
            f"{folder / split}.arrow has changed since it was prepared; remove {folder} and prepare it again"
        )
