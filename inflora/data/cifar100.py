"""CIFAR-100 (Krizhevsky 2009): 60,000 images of 32 x 32, 100 classes; the python archive or the parquet form."""

import io
import json
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from inflora.data.archives import Tree, find, open_tree
from inflora.data.source import Arrays, Options, Source
from inflora.data.store import DataError, Split

OFFICIAL = {"classes": 100, "train": 50_000, "test": 10_000}
_SIDE = 32
# All that the archive's pickles hold besides plain values: arrays of numbers.
_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _ArraysOnly(pickle.Unpickler):
    """Admits numpy arrays and plain values: a pickle of anything else could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


def read(source: Path, options: Options, scratch: Path) -> Source:
    """``cifar-100-python.tar.gz``, the folder it unpacks to, or a folder with the parquet files.

    Raises:
        DataError: Something is missing or damaged.
    """
    tree, origin = open_tree(source, scratch)
    parquet = sorted(name for name in tree.names if name.endswith(".parquet"))
    classes, splits = _from_parquet(tree, parquet) if parquet else _from_pickles(tree)
    for name, (_, labels) in splits.items():
        if labels.min() < 0 or labels.max() >= len(classes):
            raise DataError(f"the {name} labels are not all within the {len(classes)} classes: a wrong archive")
    return Source(origin, classes, splits, official=OFFICIAL)


def _from_pickles(tree: Tree) -> tuple[tuple[str, ...], dict[Split, Arrays]]:
    meta = _unpickle(tree, "meta")
    names_of_classes = _field(meta, b"fine_label_names", "meta")
    classes = tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names_of_classes)
    names: tuple[Split, ...] = ("train", "test")
    return classes, {name: _arrays(_unpickle(tree, name), name) for name in names}


def _unpickle(tree: Tree, file: str) -> dict[bytes, Any]:
    try:
        content = _ArraysOnly(io.BytesIO(tree.read(find(tree, file))), encoding="bytes").load()
    except Exception as error:  # whatever a damaged pickle makes of itself
        raise DataError(f"{file} is not CIFAR-100's pickle or damaged ({error}); download the archive again") from None
    if not isinstance(content, dict):
        raise DataError(f"{file} holds a {type(content).__name__}, expected CIFAR-100's dict: a wrong archive")
    return content


def _field(content: dict[bytes, Any], key: bytes, file: str) -> Any:
    if key not in content:
        raise DataError(f"{file} has no {key.decode()!r} (is it CIFAR-10's?): expected CIFAR-100's python archive")
    return content[key]


def _arrays(content: dict[bytes, Any], file: str) -> Arrays:
    data, labels = np.asarray(_field(content, b"data", file)), np.asarray(_field(content, b"fine_labels", file))
    if labels.dtype.kind not in "iu" or data.dtype != np.uint8 or data.shape != (len(labels), 3 * _SIDE * _SIDE):
        raise DataError(
            f"{file} holds {data.dtype} data of shape {data.shape} for {labels.size} {labels.dtype} labels: damaged"
        )
    return Arrays(data.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1), labels.astype(np.int64))


def _from_parquet(tree: Tree, files: list[str]) -> tuple[tuple[str, ...], dict[Split, Arrays]]:
    tables: dict[Split, pa.Table] = {}
    names: tuple[Split, ...] = ("train", "test")
    for split in names:
        chosen = [name for name in files if PurePosixPath(name).name.startswith(f"{split}-")]
        if not chosen:
            raise DataError(f"the source holds no {split}-*.parquet: an incomplete copy of CIFAR-100's parquet form")
        try:
            tables[split] = pa.concat_tables([pq.read_table(pa.BufferReader(tree.read(name))) for name in chosen])
        except pa.ArrowException as error:
            raise DataError(f"{chosen[0]} is damaged ({error}); download it again") from None
        missing = {"img", "fine_label"} - set(tables[split].column_names)
        if missing:
            raise DataError(f"{chosen[0]} has no column {', '.join(sorted(missing))}: not CIFAR-100's parquet form")
    return _parquet_classes(tables["train"]), {split: _decoded(table, split) for split, table in tables.items()}


def _parquet_classes(table: pa.Table) -> tuple[str, ...]:
    """Class names from the schema's metadata; numbers where it has none."""
    metadata = (table.schema.metadata or {}).get(b"huggingface", b"{}")
    features = json.loads(metadata).get("info", {}).get("features", {})
    names = features.get("fine_label", {}).get("names")
    return tuple(names or map(str, range(1 + max(table.column("fine_label").to_pylist()))))


def _decoded(table: pa.Table, split: Split) -> Arrays:
    labels = table.column("fine_label").to_numpy().astype(np.int64)
    pixels = np.empty((len(labels), _SIDE, _SIDE, 3), np.uint8)
    for index, image in enumerate(table.column("img")):
        try:
            pixels[index] = np.asarray(Image.open(io.BytesIO(image["bytes"].as_py())).convert("RGB"))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"image {index} of the {split} parquet files is damaged ({error})") from None
    return Arrays(pixels, labels)
