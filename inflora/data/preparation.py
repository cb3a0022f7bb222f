"""From a dataset's own distribution to a store: read once, checked, decoded in parallel, resumable."""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from pydantic import ValidationError

from inflora.data.errors import DataError
from inflora.data.images import decoded
from inflora.data.manifest import FORMAT, Form, Manifest, Shard, Split, SplitManifest, read_manifest
from inflora.data.source import Arrays, Dataset, Files, Options, Source
from inflora.data.store import Rows, verify_split, write_shard

SHARD_IMAGES = 1024
"""Image files per shard: what is held in memory at a time, and what is done again after an interruption."""

_MOST_SHORTER_SIDE = 8192
_WAIT_S = 60  # for another process that prepares the same store


class Progress(NamedTuple):
    """Where preparation is: for progress displays."""

    split: Split
    done: int
    images: int


def prepare(
    folder: Path,
    name: str,
    dataset: Dataset,
    source: Path,
    options: Options,
    *,
    shorter_side: int | None = None,
    subset: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Manifest:
    """Write the store ``folder`` whole or not at all; what an interrupted call has done is not done again.

    Args:
        folder: Becomes the store. One that is there already is verified against the source and left as it is.
        name: What the store is called.
        dataset: How to read the source.
        source: The distribution: file or folder.
        options: The dataset's own choices.
        shorter_side: Decode image files once, shrunk to this shorter side in pixels; None keeps them encoded.
        subset: Accept other numbers of images and classes than the official dataset's.
        on_progress: Told after every shard.

    Raises:
        DataError: What the source holds is not the dataset, or damaged; or another store is in the way.
    """
    check_name(name)
    if shorter_side is not None and not 1 <= shorter_side <= _MOST_SHORTER_SIDE:
        raise DataError(f"--shorter-side must be between 1 and {_MOST_SHORTER_SIDE}, got {str(shorter_side)[:20]}")
    try:
        there = next(path for path in folder.absolute().parents if path.is_dir())
        with TemporaryFile(dir=there):  # a lock would be waited for for ever where no file can be made
            pass
        content = dataset.read(source, options, there)
        plan = _Plan(content, name, _form(content, shorter_side), shorter_side, _check(content, name, subset=subset))
        with _only_if_it_succeeds(folder.parent), FileLock(lock_of(folder), timeout=_WAIT_S):
            return _prepare(folder, plan, on_progress)
    except Timeout:
        raise DataError(f"another process is preparing {folder} right now") from None
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"cannot write the store {folder}: {reason}; the same command goes on from here once that is mended"
        ) from None


def check_name(name: str) -> None:
    """Raise DataError unless a store may be called so: a folder of that name lies where stores lie."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise DataError(f"a store's name is made of up to 100 letters, digits, '_', '.' and '-', got {name[:100]!r}")


@contextmanager
def _only_if_it_succeeds(folder: Path) -> Iterator[None]:
    """A folder and those above it, made now; a refusal takes away what it has made of them."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except Exception:
        for path in absent:
            with suppress(OSError):  # somebody else's files are in it
                path.rmdir()
        raise


def lock_of(folder: Path) -> Path:
    """The lock that is held while the store ``folder`` is made."""
    return folder.parent / f".{folder.name}.lock"


class _Plan(NamedTuple):
    """A source, and the form in which it is to be stored."""

    content: Source
    name: str
    form: Form
    shorter_side: int | None
    whole: bool

    @property
    def origin(self) -> str:
        """The source and the form in words, as the manifest keeps them."""
        shrunk = f", shrunk to a shorter side of {self.shorter_side}" if self.form == "decoded" else ""
        return self.content.origin + shrunk


def _prepare(folder: Path, plan: _Plan, on_progress: Callable[[Progress], None]) -> Manifest:
    """The store, by whoever holds its lock."""
    partial = folder.parent / f".{folder.name}.partial"
    try:
        if (folder / "manifest.json").exists():
            return _verified(folder, plan.name, plan.origin)
        if folder.exists():
            raise DataError(f"{folder} exists and is no store; remove it or choose another --root")
        partial.mkdir(exist_ok=True)
        _forget_other_plans(partial, plan)
        manifest = _written(partial, plan, on_progress)
        partial.rename(folder)  # at once: nobody sees half a store
        return manifest
    except DataError:  # no other attempt would get further
        shutil.rmtree(partial, ignore_errors=True)
        lock_of(folder).unlink(missing_ok=True)
        raise
    finally:
        if not any(partial.glob("*.arrow")):  # nothing worth going on from
            shutil.rmtree(partial, ignore_errors=True)


def _written(partial: Path, plan: _Plan, on_progress: Callable[[Progress], None]) -> Manifest:
    """A whole store's files in ``partial``, the manifest last."""
    content = plan.content
    manifest = Manifest(
        dataset=plan.name,
        source=plan.origin,
        classes=list(content.classes),
        domains=list(content.domains),
        test_domains=list(content.test_domains),
        form=plan.form,
        channels=_channels(content),
        whole=plan.whole,
        splits={
            split: SplitManifest(
                per_class=_per_class(images, len(content.classes)),
                shards=list(_shards(split, images, plan, partial, on_progress)),
            )
            for split, images in content.splits.items()
        },
    ).sealed()
    # Notes and the plan served an interruption; a store holds its shards and its manifest alone.
    keep = {shard.file for split in manifest.splits.values() for shard in split.shards}
    for file in partial.iterdir():
        if file.name not in keep:
            file.unlink()
    (partial / "manifest.json").write_text(manifest.model_dump_json(indent=2))
    return manifest


def _check(source: Source, name: str, *, subset: bool) -> bool:
    """True if the source is known to be the whole official dataset.

    Raises:
        DataError: A class has no images in a split, or (without ``subset``) the numbers are not the official ones.
    """
    for split, images in source.splits.items():
        counts = _per_class(images, len(source.classes))
        if 0 in counts and not source.gaps:
            raise DataError(f"class {source.classes[counts.index(0)]!r} has no {split} images: an incomplete source")
    found = {"classes": len(source.classes)} | {split: _count(images) for split, images in source.splits.items()}
    wrong = {what: expected for what, expected in source.official.items() if found[what] != expected}
    if wrong and not subset:
        shown = ", ".join(f"{found[what]} {what} (expected {expected})" for what, expected in wrong.items())
        raise DataError(f"{name} is not the whole dataset: {shown}; --subset accepts what is there")
    return bool(source.official) and not wrong


def _verified(folder: Path, name: str, origin: str) -> Manifest:
    manifest = read_manifest(folder)
    if (manifest.dataset, manifest.source) != (name, origin):
        raise DataError(
            f"{folder} holds another store ({manifest.dataset} from {manifest.source}, not {name} from {origin}); "
            "remove it or choose another --root"
        )
    for split in manifest.splits:
        verify_split(folder, split)
    return manifest


def _forget_other_plans(partial: Path, plan: _Plan) -> None:
    """Remove what was begun from another source, with other options or in another format."""
    digest = hashlib.sha256(f"{plan.origin} {SHARD_IMAGES} {FORMAT}".encode())
    for split, images in plan.content.splits.items():
        digest.update(repr((split, _count(images), images.entries if isinstance(images, Files) else ())).encode())
    noted = partial / "plan"
    if not noted.exists() or noted.read_text() != digest.hexdigest():
        for file in [*partial.glob("*.arrow"), *partial.glob("*.json")]:
            file.unlink()
        noted.write_text(digest.hexdigest())


def _shards(
    split: Split, images: Arrays | Files, plan: _Plan, partial: Path, on_progress: Callable[[Progress], None]
) -> Iterator[Shard]:
    total, size = _count(images), _count(images) if plan.form == "raw" else SHARD_IMAGES
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for number, first in enumerate(range(0, total, size)):
            path = partial / f"{split}-{number:05}.arrow"
            note = path.with_suffix(".json")  # written last: a shard without a whole one is done again
            shard = _read_note(note)
            if shard is None:
                rows = _rows(images, slice(first, first + size), plan.shorter_side, pool)
                shard = write_shard(path, rows, plan.form)
                note.write_text(shard.model_dump_json())
            yield shard
            on_progress(Progress(split, min(first + size, total), total))


def _read_note(path: Path) -> Shard | None:
    """The note of a shard that an interrupted preparation has finished; None if it has not."""
    try:
        return Shard.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _rows(images: Arrays | Files, chosen: slice, shorter_side: int | None, pool: ThreadPoolExecutor) -> Rows:
    if isinstance(images, Arrays):
        pixels, labels = images.pixels[chosen], images.labels[chosen]
        sizes = np.broadcast_to(np.array(pixels.shape[1:3]), (len(labels), 2))
        return Rows(pixels, sizes, labels, np.zeros(len(labels), np.int64))  # type: ignore[arg-type]
    entries = images.entries[chosen]
    tree = images.tree

    def load(name: str) -> tuple[bytes | np.ndarray, tuple[int, int]]:
        return _loaded(tree.read(name), name, shorter_side)

    contents, sizes_list = zip(*pool.map(load, [entry.name for entry in entries]), strict=True)
    labels_list, domains_list = zip(*((entry.label, entry.domain) for entry in entries), strict=True)
    return Rows(contents, np.array(sizes_list), np.array(labels_list), np.array(domains_list))


def _loaded(content: bytes, name: str, shorter_side: int | None) -> tuple[bytes | np.ndarray, tuple[int, int]]:
    """The content to be stored of one image file, its height and width; the file is decoded, whole, in either form.

    Raises:
        DataError: It cannot be decoded.
    """
    image = decoded(content, name)
    if shorter_side is None:
        return content, (image.height, image.width)
    share = shorter_side / min(image.size)
    if share < 1:
        image = image.resize((round(image.width * share), round(image.height * share)), Image.Resampling.BILINEAR)
    return np.asarray(image), (image.height, image.width)


def _form(source: Source, shorter_side: int | None) -> Form:
    if isinstance(source.splits["train"], Arrays):
        if shorter_side is not None:
            raise DataError("--shorter-side is for datasets of image files; this one is stored as arrays already")
        return "raw"
    return "encoded" if shorter_side is None else "decoded"


def _channels(source: Source) -> int:
    train = source.splits["train"]
    return int(train.pixels.shape[3]) if isinstance(train, Arrays) else 3


def _count(images: Arrays | Files) -> int:
    return len(images.labels) if isinstance(images, Arrays) else len(images.entries)


def _per_class(images: Arrays | Files, classes: int) -> list[int]:
    labels = images.labels if isinstance(images, Arrays) else [entry.label for entry in images.entries]
    return np.bincount(labels, minlength=classes).tolist()
