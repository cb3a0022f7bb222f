"""CIFAR-100 (Krizhevsky 2009): 60,000 images of 32 x 32, 100 classes; the python archive or the parquet form."""

import io
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from inflora.data.archives import Tree, find, open_tree
from inflora.data.errors import DataError, brief
from inflora.data.files import within_bounds
from inflora.data.images import decoded
from inflora.data.manifest import Split
from inflora.data.source import Arrays, Options, Source

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
        if not len(labels) or labels.min() < 0 or labels.max() >= len(classes):
            raise DataError(f"the {name} labels are none or not within the {len(classes)} classes: a wrong archive")
    return Source(origin, classes, splits, official=OFFICIAL)


def _from_pickles(tree: Tree) -> tuple[tuple[str, ...], dict[Split, Arrays]]:
    words = _field(_unpickle(tree, "meta"), b"fine_label_names", "meta")
    if not isinstance(words, list) or not all(isinstance(word, bytes | str) for word in words):
        raise DataError("meta's fine_label_names are no list of names: a wrong or damaged archive")
    classes = tuple(word.decode(errors="replace") if isinstance(word, bytes) else word for word in words)
    names: tuple[Split, ...] = ("train", "test")
    return classes, {name: _arrays(_unpickle(tree, name), name) for name in names}


def _unpickle(tree: Tree, file: str) -> dict[bytes, Any]:
    stored = tree.read(find(tree, file))
    try:
        content = _ArraysOnly(io.BytesIO(stored), encoding="bytes").load()
    except Exception as error:  # whatever a damaged pickle makes of itself
        raise DataError(
            f"{file} is not CIFAR-100's pickle or damaged ({brief(error)}); download the archive again"
        ) from None
    if not isinstance(content, dict):
        raise DataError(f"{file} holds a {type(content).__name__}, expected CIFAR-100's dict: a wrong archive")
    return content


def _field(content: dict[bytes, Any], key: bytes, file: str) -> Any:
    if key not in content:
        raise DataError(f"{file} has no {key.decode()!r} (is it CIFAR-10's?): expected CIFAR-100's python archive")
    return content[key]


def _arrays(content: dict[bytes, Any], file: str) -> Arrays:
    try:
        data, labels = (np.asarray(_field(content, key, file)) for key in (b"data", b"fine_labels"))
    except DataError:
        raise
    except Exception as error:  # ragged lists, objects that only look like sequences
        raise DataError(f"{file} holds no arrays ({brief(error)}): a wrong or damaged archive") from None
    expected = (labels.size, 3 * _SIDE * _SIDE)
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or data.dtype != np.uint8 or data.shape != expected:
        raise DataError(
            f"{file} holds {data.dtype} data of shape {data.shape} for {labels.dtype} labels of shape {labels.shape}: "
            "a wrong or damaged archive"
        )
    return Arrays(data.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1), labels.astype(np.int64))


class _Names(BaseModel):
    names: list[str] | None = None


class _Features(BaseModel):
    fine_label: _Names = _Names()


class _Info(BaseModel):
    features: _Features = _Features()


class _Metadata(BaseModel):
    """The parquet form's own description of its columns, as far as it is read here."""

    info: _Info = _Info()


def _from_parquet(tree: Tree, files: list[str]) -> tuple[tuple[str, ...], dict[Split, Arrays]]:
    names: tuple[Split, ...] = ("train", "test")
    tables: dict[Split, pa.Table] = {}
    for split in names:
        chosen = [name for name in files if PurePosixPath(name).name.startswith(f"{split}-")]
        if not chosen:
            raise DataError(f"the source holds no {split}-*.parquet: an incomplete copy of CIFAR-100's parquet form")
        parts = [_table(tree.read(name), name) for name in chosen]
        try:
            tables[split] = pa.concat_tables(parts)
        except pa.ArrowException as error:
            raise DataError(f"the {split} parquet files do not fit each other ({brief(error)})") from None
    splits = {split: _decoded(table, split) for split, table in tables.items()}
    return _parquet_classes(tables["train"], splits["train"].labels), splits


def _table(content: bytes, name: str) -> pa.Table:
    """The images and labels of one parquet file."""
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        groups = (file.metadata.row_group(index) for index in range(file.num_row_groups))
        within_bounds(sum(group.total_byte_size for group in groups), f"what {name} unpacks to")
        table = file.read()
        table.validate(full=True)
    except DataError:
        raise
    except Exception as error:  # whatever a damaged file makes of itself
        raise DataError(f"{name} is damaged ({brief(error)}); download it again") from None
    if missing := {"img", "fine_label"} - set(table.column_names):
        raise DataError(f"{name} has no column {', '.join(sorted(missing))}: not CIFAR-100's parquet form")
    images, labels = table.schema.field("img").type, table.schema.field("fine_label").type
    encoded = pa.types.is_struct(images) and images.get_field_index("bytes") >= 0 and images.field("bytes").type
    if not (encoded and (pa.types.is_binary(encoded) or pa.types.is_large_binary(encoded))):
        raise DataError(f"the column img of {name} holds {brief(images)}, expected structs with the bytes of an image")
    if not pa.types.is_integer(labels) or table.column("fine_label").null_count:
        raise DataError(f"the column fine_label of {name} holds {labels} or nothing in places, expected whole numbers")
    return table.select(["img", "fine_label"])


def _parquet_classes(table: pa.Table, labels: np.ndarray) -> tuple[str, ...]:
    """Class names from the schema's metadata; numbers where it has none."""
    written = (table.schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        names = _Metadata.model_validate_json(written).info.features.fine_label.names
    except ValidationError as error:
        raise DataError(f"the parquet files' metadata names no classes ({error.errors()[0]['msg']})") from None
    if names:
        return tuple(names)
    # As many as there are labels at most: else a class would have no image, and a wrong label fill the memory.
    return tuple(map(str, range(1 + min(int(labels.max(initial=0)), len(labels)))))


def _decoded(table: pa.Table, split: Split) -> Arrays:
    labels = table.column("fine_label").to_numpy().astype(np.int64)
    pixels = np.empty((len(labels), _SIDE, _SIDE, 3), np.uint8)
    for index, image in enumerate(table.column("img")):
        name = f"{index} of the {split} parquet files"
        content = image["bytes"].as_py() if image.is_valid else None
        if content is None:
            raise DataError(f"image {name} is missing; download them again")
        opened = decoded(content, name)
        if opened.size != (_SIDE, _SIDE):
            raise DataError(f"image {name} is {opened.width} x {opened.height}, expected {_SIDE} x {_SIDE}")
        pixels[index] = np.asarray(opened)
    return Arrays(pixels, labels)
