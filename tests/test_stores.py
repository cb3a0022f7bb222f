"""Stores that were edited or damaged: whatever is read gives a right answer or one line that says what to do."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from inflora.data import DATASETS, ensure_store, prepare_store, samples, store
from inflora.data.errors import DataError
from inflora.data.manifest import read_manifest
from inflora.data.source import Options
from inflora.data.store import default_root, open_split, verify_split
from tests.test_inflora_cli import inflora, refused

TRAIN = "train-00000.arrow"
CLASSES, PER_CLASS = 3, 4
FORMS = {"raw": ("cifar100", None), "encoded": ("image_folder", None), "decoded": ("image_folder", 20)}
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Path]:
    """A store of every form; copy them to damage them."""
    made = {}
    for form, (name, side) in FORMS.items():
        folder = tmp_path_factory.mktemp(form)
        source = samples.SAMPLES[name](folder, CLASSES, PER_CLASS)
        made[form] = prepare_store(name, DATASETS[name], source, Options(), str(folder / "root"), side, subset=True)
    return made


@pytest.fixture
def copy(stores, tmp_path):
    """Makes a copy of a store that can be damaged."""
    return lambda form: Path(shutil.copytree(stores[form], tmp_path / "root" / "mine"))


def test_the_variable_of_the_stores_is_a_folder_or_says_nothing(monkeypatch):
    for said in ("", "  "):
        monkeypatch.setenv("INFLORA_DATA", said)
        assert default_root() == Path.home() / ".cache" / "inflora" / "data"
    monkeypatch.setenv("INFLORA_DATA", "~/stores")
    assert default_root() == Path.home() / "stores"
    monkeypatch.setenv("INFLORA_DATA", "s3://bucket/stores")
    assert refused(inflora("data", "info", "digits"))


def edited(folder: Path, change) -> Path:
    """The store with another manifest, which does not know a hash of itself."""
    manifest = json.loads((folder / "manifest.json").read_text()) | {"sha256": ""}
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def rewritten(folder: Path, change) -> Path:
    """The store with another table of training images, and their number and hash in the manifest."""
    table = change(pa.ipc.open_file(folder / TRAIN).read_all().combine_chunks())
    with pa.OSFile(str(folder / TRAIN), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    facts = {"images": table.num_rows, "sha256": hashlib.sha256((folder / TRAIN).read_bytes()).hexdigest()}
    return edited(folder, lambda m: m["splits"]["train"]["shards"][0].update(facts))


def refusal(folder: Path) -> str:
    with pytest.raises(DataError, match=r"is damaged: .*; remove it and prepare it again") as error:
        open_split(folder, "train")
    assert str(folder) in str(error.value) and str(error.value).isprintable()
    return str(error.value)


def split(m: dict) -> dict:
    return m["splits"]["train"]


MANIFESTS = {
    "no shards": lambda m: split(m).update(shards=[]),
    "no counts": lambda m: split(m).update(per_class=[]),
    "counts of other classes": lambda m: split(m)["per_class"].append(0),
    "counts that do not add up": lambda m: split(m).update(per_class=[4, 4, 5]),
    "counts of other images": lambda m: split(m).update(per_class=[5, 3, 4]),
    "a negative count": lambda m: split(m).update(per_class=[9, 4, -1]),
    "counts of text": lambda m: split(m).update(per_class=["4", "4", "4"]),
    "no classes": lambda m: m.update(classes=[]),
    "a class more": lambda m: m["classes"].append("x"),
    "classes of numbers": lambda m: m.update(classes=[1, 2, 3]),
    "classes of text": lambda m: m.update(classes="abc"),
    "another form": lambda m: m.update(form={"raw": "encoded", "encoded": "decoded", "decoded": "encoded"}[m["form"]]),
    "an unknown form": lambda m: m.update(form="zip"),
    "no channels": lambda m: m.update(channels=0),
    "other channels": lambda m: m.update(channels=m["channels"] + 1),
    "no test split": lambda m: m["splits"].pop("test"),
    "another split": lambda m: m["splits"].update(validation=split(m)),
    "a file elsewhere": lambda m: split(m)["shards"][0].update(file="../../train-00000.arrow"),
    "a file twice": lambda m: split(m)["shards"].append(split(m)["shards"][0]),
    "a hash that is none": lambda m: split(m)["shards"][0].update(sha256="x"),
    "another hash": lambda m: split(m)["shards"][0].update(sha256="0" * 64),
    "another field": lambda m: m.update(compression="none"),
    "a field missing": lambda m: (m.pop("whole") and m.pop("source")) or m.pop("domains"),
    "a list of splits": lambda m: m.update(splits=[]),
    "a huge number": lambda m: split(m)["shards"][0].update(images=10**400),
}


@every_form
@pytest.mark.parametrize("damage", MANIFESTS)
def test_an_edited_manifest_is_refused(damage, form, copy):
    refusal(edited(copy(form), MANIFESTS[damage]))


def test_a_manifest_whose_text_was_changed_is_refused_whatever_was_changed(copy):
    folder = copy("encoded")
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"kind_1"', '"kind_7"'))
    assert "its text is not what was written" in refusal(folder)


def column(name: str, change):
    def changed(table: pa.Table) -> pa.Table:
        return table.set_column(table.column_names.index(name), name, change(table.column(name)))

    return changed


ROWS = CLASSES * PER_CLASS
TABLES = {
    "a column missing": lambda table: table.drop_columns(["label"]),
    "a column more": lambda table: table.append_column("more", table.column("label")),
    "columns in another order": lambda table: table.select(table.column_names[::-1]),
    "labels beyond the classes": column("label", lambda _: pa.array([0] * (ROWS - 1) + [CLASSES])),
    "negative labels": column("label", lambda _: pa.array([-1] * ROWS)),
    "huge labels": column("label", lambda _: pa.array([1 << 62] * ROWS)),
    "other labels": column("label", lambda _: pa.array([0] * ROWS)),
    "labels of text": column("label", lambda _: pa.array(["0"] * ROWS)),
    "labels missing": column("label", lambda labels: pa.array([None, *labels.to_pylist()[1:]], pa.int64())),
    "domains that it has not": column("domain", lambda _: pa.array([1] * ROWS)),
    "sizes of nothing": column("height", lambda _: pa.array([0] * ROWS, pa.int32())),
    "other sizes": column("width", lambda widths: pa.array([7, *widths.to_pylist()[1:]], pa.int32())),
    "images of text": column("image", lambda _: pa.array(["a"] * ROWS)),
    "no images": lambda table: table.slice(0, 0),
    "images missing": lambda table: table.slice(0, 5),
}


@every_form
@pytest.mark.parametrize("damage", TABLES)
def test_images_with_other_columns_than_were_written_are_refused(damage, form, copy):
    refusal(rewritten(copy(form), TABLES[damage]))


@every_form
@pytest.mark.parametrize("place", [0, 9, 700, -1, -9, -300])
def test_a_flipped_byte_is_noticed_when_a_store_is_opened(place, form, copy):
    folder = copy(form)
    content = bytearray((folder / TRAIN).read_bytes())
    content[place] ^= 0x10
    (folder / TRAIN).write_bytes(content)
    assert "train-00000.arrow has changed since it was prepared" in refusal(folder)


@every_form
def test_a_flipped_byte_in_a_store_too_large_to_be_hashed_each_time_is_noticed_by_info(form, copy, monkeypatch):
    folder = copy(form)
    content = bytearray((folder / TRAIN).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / TRAIN).write_bytes(content)
    monkeypatch.setattr(store, "HASHED_BYTES", 0)
    open_split(folder, "train")
    with pytest.raises(DataError, match="has changed since it was prepared"):
        verify_split(folder, "train")
    result = inflora("data", "info", "mine", "--root", folder.parent)
    assert refused(result) and "has changed since it was prepared" in result.stderr


def test_what_is_no_file_in_a_store_is_refused_at_once(copy):
    folder = copy("encoded")
    for name in (TRAIN, "manifest.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(DataError, match=f"{name}: it is a named pipe, expected a file"):
            open_split(folder, "train")


# Stores of earlier versions.


def of_format_2(folder: Path) -> Path:
    def change(manifest):
        manifest.pop("sha256")
        manifest["format"] = 2

    return edited(folder, change)


def test_arrays_stored_by_the_last_version_are_read_as_they_are(copy, stores):
    folder = of_format_2(copy("raw"))
    old, new = (open_split(each, "train").pixels.array(0) for each in (folder, stores["raw"]))
    assert np.array_equal(old, new)
    assert read_manifest(folder).content_hash == read_manifest(stores["raw"]).content_hash
    assert ensure_store("mine", str(folder.parent)) == folder


@pytest.mark.parametrize("form", ["encoded", "decoded"])
def test_image_files_stored_by_the_last_version_may_lie_on_their_side_and_are_refused(form, copy):
    folder = of_format_2(copy(form))
    with pytest.raises(DataError, match="store format 2, expected 3; remove it and prepare it again"):
        open_split(folder, "train")
