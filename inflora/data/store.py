"""Images on disk: Arrow IPC files, memory-mapped, with a manifest that says what must be in them.

A store is a folder ``<root>/<dataset>`` with ``manifest.json`` and shards ``train-00000.arrow``, ``test-00000.arrow`` …
Each split is opened by itself: whoever opens "train" never touches the test images.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from inflora.config import ConfigError
from inflora.data.errors import DataError, brief
from inflora.data.files import file_size, open_file
from inflora.data.manifest import Form, Manifest, Shard, Split, damaged, read_manifest
from inflora.data.pixels import FilePixels, Pixels, RawPixels

HASHED_BYTES = 1 << 28
"""Splits of at most so many bytes are compared with their hashes whenever they are opened: some 150 ms at most."""

_NUMBERS = {"height": pa.int32(), "width": pa.int32(), "label": pa.int64(), "domain": pa.int64()}
"""The columns beside an image."""


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
    """The folder in which stores live unless ``data.root`` says otherwise: ``$INFLORA_DATA``, where that is set.

    Raises:
        ConfigError: It is a URI: copies of what lies at those need a folder of this machine.
    """
    root = os.environ.get("INFLORA_DATA", "")
    if "://" in root:
        raise ConfigError(f"$INFLORA_DATA must be a folder of this machine, got {root!r}; a URI is given as data.root")
    return Path(root).expanduser() if root.strip() else Path.home() / ".cache" / "inflora" / "data"


def write_shard(path: Path, rows: Rows, form: Form) -> Shard:
    """Write one Arrow file; the same rows give the same bytes."""
    if form == "raw":
        flat = np.ascontiguousarray(rows.images, dtype=np.uint8).reshape(len(rows.labels), -1)
        images = pa.FixedSizeBinaryArray.from_buffers(pa.binary(flat.shape[1]), len(flat), [None, pa.py_buffer(flat)])
    else:
        images = pa.array(map(bytes, rows.images), pa.large_binary())
    height, width = rows.sizes.T
    numbers = {"height": height, "width": width, "label": rows.labels, "domain": rows.domains}
    columns = {
        "image": images,
        **{name: pa.array(values, _NUMBERS[name]) for name, values in numbers.items()},
    }
    batch = pa.record_batch(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return Shard(file=path.name, images=len(rows.labels), sha256=_file_hash(path))


def _file_hash(path: Path) -> str:
    with open_file(path) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def open_split(folder: Path, split: Split) -> Images:
    """The images of one split, memory-mapped.

    Files of together at most ``HASHED_BYTES`` are compared with their hashes. Of larger ones everything but the pixels
    is compared with the manifest, and ``verify_split`` compares all.

    Raises:
        DataError: The split is missing or does not hold what the manifest says.
    """
    manifest = read_manifest(folder)
    held = manifest.splits[split]
    if sum(file_size(folder / shard.file) for shard in held.shards) <= HASHED_BYTES:
        _compare_hashes(folder, held.shards)
    tables = [_open_shard(folder, shard, manifest.form) for shard in held.shards]
    labels, domains, heights, widths = (
        torch.from_numpy(np.concatenate([table.column(name).to_numpy() for table in tables]))
        for name in ("label", "domain", "height", "width")
    )
    columns = [table.column("image").chunk(0) for table in tables]
    sizes = torch.stack([heights, widths], 1)
    if reason := _disagreement(manifest, split, labels, domains, sizes, columns):
        raise damaged(folder, f"its {split} images {reason}")
    if manifest.form == "raw":
        height, width = sizes[0].tolist()
        pixels: Pixels = RawPixels.mapped(columns[0], height, width, manifest.channels)
    else:
        encoded = manifest.form == "encoded"
        pixels = FilePixels(columns, sizes, encoded=encoded, store=folder)
        pixels.array(0)  # image files are what the manifest says they are
    return Images(pixels, labels, domains)


def _open_shard(folder: Path, shard: Shard, form: Form) -> pa.Table:
    path = folder / shard.file
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate(full=True)
    except Exception as error:  # whatever a damaged file makes of itself
        raise damaged(folder, f"cannot read {path}: {brief(error)}") from None
    if not _is_schema(table.schema, form):
        raise damaged(folder, f"{path} has other columns than {form} images")
    if table.num_rows != shard.images:
        raise damaged(folder, f"{path} holds {table.num_rows} images, its manifest says {shard.images}")
    if any(column.num_chunks != 1 or column.null_count for column in table.columns):
        raise damaged(folder, f"{path} is not the one batch that was written")
    return table


def _is_schema(schema: pa.Schema, form: Form) -> bool:
    images, *others = zip(schema.names, schema.types, strict=True)
    binary = pa.types.is_fixed_size_binary if form == "raw" else pa.types.is_large_binary
    return images[0] == "image" and binary(images[1]) and others == list(_NUMBERS.items())


def _disagreement(
    manifest: Manifest, split: Split, labels: Tensor, domains: Tensor, sizes: Tensor, columns: Sequence[pa.Array]
) -> str | None:
    """The first way in which a split's columns are not as the manifest says; None where they agree."""
    classes, named, areas = len(manifest.classes), len(manifest.domains_of(split)), sizes.long().prod(1)
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        return f"have labels outside of its {classes} classes"
    if labels.bincount(minlength=classes).tolist() != manifest.splits[split].per_class:
        return "are not as many of each class as its manifest says"
    if not 0 <= int(domains.min()) <= int(domains.max()) < max(1, named):
        return f"have domains outside of its {named}"
    if int(sizes.min()) < 1:
        return "have sizes that no image has"
    if manifest.form == "raw" and bool((sizes != sizes[0]).any()):
        return "are not all of one size"
    lengths = np.concatenate([pc.binary_length(column).to_numpy() for column in columns])
    if manifest.form != "encoded" and not np.array_equal(lengths, manifest.channels * areas.numpy()):
        return "do not have the sizes and channels that are recorded of them"
    return None


def verify_split(folder: Path, split: Split) -> None:
    """Compare a split's files with the hashes in the manifest.

    Raises:
        DataError: A file has changed since it was written.
    """
    _compare_hashes(folder, read_manifest(folder).splits[split].shards)


def _compare_hashes(folder: Path, shards: Sequence[Shard]) -> None:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        hashes = pool.map(lambda shard: _file_hash(folder / shard.file), shards)
        for shard, found in zip(shards, hashes, strict=True):
            if found != shard.sha256:
                raise damaged(folder, f"{folder / shard.file} has changed since it was prepared")
