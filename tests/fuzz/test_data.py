"""Images, archives, lists and stores with some bytes changed anywhere: a right answer or one line.

A right answer: where a format has no checksum (a JPEG's pixels, a tar's content), what the changed bytes say; the
files of a store have checksums, so there it is what was stored.
"""

import io
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from inflora.data import DATASETS, prepare_store, samples, store
from inflora.data.images import FORMATS, MOST_PIXELS, decoded
from inflora.data.manifest import read_manifest
from inflora.data.source import Options
from inflora.data.store import open_split
from tests.fuzz.answers import OneLine, answered

pytestmark = pytest.mark.fuzz

CLASSES, PER_CLASS = 2, 2
place = st.one_of(st.floats(0, 1, exclude_max=True), st.integers(0, 300), st.integers(-300, -1))
changes = st.lists(st.tuples(place, st.integers(1, 255)), min_size=1, max_size=4)
cut = st.one_of(st.just(1.0), st.just(1.0), st.floats(0, 1))


def changed(content: bytes, flips: list[tuple[float, int]], share: float = 1.0) -> bytes:
    """Some bytes flipped, at shares of the length or counted from one of its ends, and the end cut off."""
    damaged = bytearray(content)
    for where, mask in flips:
        index = where if isinstance(where, int) else int(where * len(content))
        damaged[max(-len(content), min(index, len(content) - 1))] ^= mask
    return bytes(damaged[: round(share * len(content))])


def answer(ask: Callable[[], object]) -> object | None:
    """The answer, or None where it is one line."""
    given = answered(ask)
    return None if isinstance(given, OneLine) else given


# Images.


def saved(name: str, **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(samples.striped(0, 2, (24, 30), np.random.default_rng(0)))
    exif = Image.Exif()
    exif[274] = 6
    image.save(buffer, name, **({"exif": exif} if name in ("JPEG", "PNG", "TIFF", "WEBP") else {}) | options)
    return buffer.getvalue()


IMAGES = {name: saved(name) for name in FORMATS} | {
    "TIFF deflate": saved("TIFF", compression="tiff_deflate"),
    "TIFF lzw": saved("TIFF", compression="tiff_lzw"),
    "TIFF jpeg": saved("TIFF", compression="jpeg"),
    "JPEG progressive": saved("JPEG", progressive=True),
}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(flips=changes, share=cut)
@pytest.mark.parametrize("name", IMAGES)
def test_a_changed_image(name, flips, share, capfd):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # pytest has put its filters before those of the reader
        image = answer(lambda: decoded(changed(IMAGES[name], flips, share), "it"))
    if image is not None:
        assert image.mode == "RGB" and 0 < image.width * image.height <= MOST_PIXELS
    said = capfd.readouterr()
    assert not said.out and (
        not said.err or name.startswith("TIFF ")
    )  # libtiff has words of its own for compressed ones


@settings(max_examples=150)
@given(head=st.sampled_from([content[:16] for content in IMAGES.values()]), rest=st.binary(max_size=200))
def test_bytes_that_only_begin_like_an_image(head, rest):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        answer(lambda: decoded(head + rest, "it"))


# Sources.


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """Every dataset's distribution, with the classes and options to read it again."""
    folder = tmp_path_factory.mktemp("sources")
    made = {}
    for name, write in SOURCES.items():
        (folder / name).mkdir()
        made[name] = write(folder / name, CLASSES, PER_CLASS)
    (folder / "zip").mkdir()
    made["zip"] = Path(shutil.make_archive(str(folder / "zip" / "images"), "zip", made["image_folder"]))
    return made


SOURCES = samples.SAMPLES | {"parquet": samples.cifar100_parquet}
READ_AS = {"parquet": "cifar100", "zip": "image_folder"}


def files_of(source: Path) -> list[Path]:
    return sorted(file for file in source.rglob("*") if file.is_file()) if source.is_dir() else [source]


@settings(max_examples=25)
@given(which=st.integers(0), flips=changes, share=cut)
@pytest.mark.parametrize("name", [*SOURCES, "zip"])
def test_a_changed_source(name, which, flips, share, sources, tmp_path_factory):
    file = files_of(sources[name])[which % len(files_of(sources[name]))]
    content, folder = file.read_bytes(), tmp_path_factory.mktemp("root")
    options = Options(domains=("real",)) if name == "domainnet" else Options()
    dataset = DATASETS[READ_AS.get(name, name)]
    try:
        file.write_bytes(changed(content, flips, share))
        made = answer(lambda: prepare_store("it", dataset, sources[name], options, str(folder), subset=True))
    finally:
        file.write_bytes(content)
    if made is None:
        assert not list(folder.iterdir())
    else:
        assert len(open_split(made, "train").labels) == read_manifest(made).splits["train"].images
    shutil.rmtree(folder)


odd = st.sampled_from(["0", "1", "²", "9" * 5000, "-1", "real/a/b.jpg", "real", "\u2028"])
lists = st.lists(st.lists(odd | st.text(max_size=9), max_size=3).map(" ".join), max_size=4).map("\n".join)


@settings(max_examples=60)
@given(listed=lists, encoding=st.sampled_from(["utf-8", "utf-16"]))
@pytest.mark.parametrize("name", ["domainnet", "imagenet_r"])
def test_a_list_of_anything(name, listed, encoding, sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lists")
    content = listed.encode(encoding, errors="surrogatepass")
    source, options = sources[name], Options(domains=("real",))
    if name == "domainnet":
        shutil.copy(source / "real.zip", folder)
        for split in ("train", "test"):
            (folder / f"real_{split}.txt").write_bytes(content)
        source = folder
    else:
        (folder / "list.yaml").write_bytes(content)
        options = Options(test_list=folder / "list.yaml")
    answer(lambda: prepare_store("it", DATASETS[name], source, options, str(folder / "root"), subset=True))
    shutil.rmtree(folder)


# Stores.


@pytest.fixture(scope="module")
def stores(sources, tmp_path_factory) -> dict[str, tuple[Path, list[object]]]:
    """A store of every form and what it holds; what is changed in them is put right again."""
    root = tmp_path_factory.mktemp("stores")
    kinds = {"raw": ("cifar100", None), "encoded": ("image_folder", None), "decoded": ("image_folder", 20)}
    made = {}
    for form, (name, side) in kinds.items():
        folder = prepare_store(form, DATASETS[name], sources[name], Options(), str(root), side, subset=True)
        made[form] = (folder, held(folder))
    return made


def held(folder: Path) -> list[object]:
    """All that a run learns from a store."""
    manifest, images = read_manifest(folder), open_split(folder, "train")
    pixels = [images.pixels.array(row).tobytes() for row in range(len(images.pixels))]
    return [manifest.classes, manifest.domains, manifest.whole, images.labels.tolist(), images.domains.tolist(), pixels]


@settings(max_examples=60)
@given(flips=changes, share=cut)
@pytest.mark.parametrize("file", ["manifest.json", "train-00000.arrow"])
@pytest.mark.parametrize("form", ["raw", "encoded", "decoded"])
def test_a_changed_store_gives_what_was_stored_or_one_line(form, file, flips, share, stores):
    folder, right = stores[form]
    path, content = folder / file, (folder / file).read_bytes()
    try:
        path.write_bytes(changed(content, flips, share))
        found = answer(lambda: held(folder))
    finally:
        path.unlink()  # not written over: the file may still be mapped
        path.write_bytes(content)
    assert found is None or found == right


@settings(max_examples=60)
@given(flips=changes)
@pytest.mark.parametrize("form", ["raw", "encoded", "decoded"])
def test_a_changed_store_that_is_too_large_to_be_hashed_has_labels_and_sizes_or_is_one_line(form, flips, stores):
    folder, right = stores[form]
    path, content = folder / "train-00000.arrow", (folder / "train-00000.arrow").read_bytes()
    try:
        path.unlink()
        path.write_bytes(changed(content, flips))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "HASHED_BYTES", 0)
            found = answer(lambda: held(folder))
    finally:
        path.unlink()
        path.write_bytes(content)
    if found is not None:
        assert sorted(found[3]) == sorted(right[3])
        assert [len(image) for image in found[5]] == [len(image) for image in right[5]]


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60)
@given(field=st.integers(0), value=values)
@pytest.mark.parametrize("of", ["manifest", "split", "shard"])
def test_a_manifest_with_any_value_in_a_field(of, field, value, stores):
    folder, right = stores["decoded"]
    path, content = folder / "manifest.json", (folder / "manifest.json").read_text()
    manifest = json.loads(content) | {"sha256": ""}
    split = manifest["splits"]["train"]
    part = {"manifest": manifest, "split": split, "shard": split["shards"][0]}[of]
    name = list(part)[field % len(part)]
    part[name] = value
    try:
        path.write_text(json.dumps(manifest))
        found = answer(lambda: held(folder))
    finally:
        path.write_text(content)
    # A person may give a store other names: those are then its names.
    assert found is None or found == right or name in ("domains", "whole")
