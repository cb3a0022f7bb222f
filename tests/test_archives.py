"""Sources that are malformed: each is one line, and nothing is left of the command."""

import gzip
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inflora.data import DATASETS, archives, prepare_store, samples
from inflora.data.archives import FolderTree, open_tree
from inflora.data.errors import DataError
from inflora.data.manifest import read_manifest
from inflora.data.samples import SAMPLES, encoded
from inflora.data.source import Options
from tests.test_inflora_cli import inflora, refused
from tests.test_sources import repacked

CLASSES, PER_CLASS = 2, 3
DEFAULTS = Options()


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    made = {}
    for name, write in (SAMPLES | {"cifar100 parquet": samples.cifar100_parquet}).items():
        (folder / name).mkdir()
        made[name] = write(folder / name, CLASSES, PER_CLASS)
    return made


def prepared(name: str, source: Path, root: Path, options: Options = DEFAULTS) -> Path:
    return prepare_store(name, DATASETS[name], source, options, str(root), subset=True)


def says(name: str, source: Path, folder: Path, options: Options = DEFAULTS) -> str:
    """The line with which a source is refused, and that nothing is left of the attempt."""
    root = folder / "new" / "root"
    with pytest.raises(DataError) as error:
        prepared(name, source, root, options)
    assert not root.parent.exists()
    assert str(error.value).isprintable() and len(str(error.value)) < 1000
    return str(error.value)


def image(label: int = 0, form: str = "PNG") -> bytes:
    return encoded(label, CLASSES, np.random.default_rng(0), form)


def class_folders() -> dict[str, bytes]:
    return {f"{split}/{kind}/0.png": image() for split in ("train", "test") for kind in "ab"}


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


# Tar.


def tar_of(path: Path, *members: tarfile.TarInfo) -> Path:
    """A tar of class folders and of more members, which have no content."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in class_folders().items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in members:
            tar.addfile(info)
    return path


def member(name: str, **facts) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for fact, value in facts.items():
        setattr(info, fact, value)
    return info


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (member("train/a/1.png", type=tarfile.SYMTYPE, linkname="0.png"), "is a link, sparse or a device"),
        (member("train/a/1.png", type=tarfile.LNKTYPE, linkname="train/a/0.png"), "is a link, sparse or a device"),
        (member("train/a/1.png", type=tarfile.FIFOTYPE), "is a link, sparse or a device"),
        (member("train/a/1.png", type=tarfile.GNUTYPE_SPARSE, size=1 << 40), "is a link, sparse or a device"),
        (member("train/a/1.png", size=1 << 60), "damaged"),
        (member("train/a/1.png", size=-(1 << 20)), "damaged"),
    ],
    ids=["link", "hard link", "pipe", "sparse", "too large", "leads back"],
)
def test_a_tar_with_other_members_than_files_or_with_senseless_sizes_is_refused(info, reason, tmp_path):
    assert reason in says("image_folder", tar_of(tmp_path / "bad.tar", info), tmp_path)


def test_a_gzip_file_that_unpacks_to_a_thousand_times_its_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_MOST_UNPACKED", 1 << 20)
    (tmp_path / "bomb.tar.gz").write_bytes(gzip.compress(bytes(40 << 20)))
    assert "unpacks to more than" in says("image_folder", tmp_path / "bomb.tar.gz", tmp_path)


# Zip.


def test_a_zip_of_a_version_that_nobody_knows_is_refused(tmp_path):
    content = zipped(tmp_path / "z.zip", class_folders()).read_bytes()
    entry = content.index(b"PK\x01\x02")
    (tmp_path / "z.zip").write_bytes(content[: entry + 6] + b"\x63\x00" + content[entry + 8 :])
    assert "zip file version 9.9" in says("image_folder", tmp_path / "z.zip", tmp_path)


def test_a_zip_whose_names_are_not_the_text_that_they_claim_to_be_is_refused(tmp_path):
    content = zipped(tmp_path / "z.zip", {"train/é/0.png": image()}).read_bytes()
    (tmp_path / "z.zip").write_bytes(content.replace("é".encode(), b"\xe9\xff"))
    assert "is no zip file or a damaged one" in says("image_folder", tmp_path / "z.zip", tmp_path)


def test_a_file_in_an_archive_that_is_larger_than_any_datasets_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("inflora.data.files.MOST_BYTES", 1 << 20)
    bomb = class_folders() | {"train/a/1.png": bytes(2 << 20)}
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in bomb.items():
            archive.writestr(name, content)
    assert "train/a/1.png in" in (line := says("image_folder", tmp_path / "z.zip", tmp_path))
    assert "has 2,097,152 bytes; at most 1,048,576" in line


# Names.


def test_names_that_are_not_utf8_are_read_and_classes_shown_as_latin1(tmp_path):
    expected = ["b", "café"]
    folder = tmp_path / "folder"
    files = {f"{split}/{kind}/\udce9.png": image() for split in ("train", "test") for kind in ("caf\udce9", "b")}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    with tarfile.open(tmp_path / "t.tar", "w", encoding="utf-8", errors="surrogateescape") as tar:
        tar.add(folder, "top")
    assert read_manifest(prepared("image_folder", folder, tmp_path / "one")).classes == expected
    assert read_manifest(prepared("image_folder", tmp_path / "t.tar", tmp_path / "two")).classes == expected


def test_a_zips_names_without_the_flag_for_utf8_are_read_as_utf8_all_the_same(tmp_path):
    files = {name.replace("/a/", "/é/"): content for name, content in class_folders().items()}
    content = zipped(tmp_path / "z.zip", files).read_bytes()
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        first, *headers = content.split(signature)
        high = offset - len(signature) + 1  # of the flags
        cleared = (header[:high] + bytes([header[high] & ~8]) + header[high + 1 :] for header in headers)
        content = signature.join([first, *cleared])
    (tmp_path / "z.zip").write_bytes(content)
    assert read_manifest(prepared("image_folder", tmp_path / "z.zip", tmp_path / "root")).classes == ["b", "é"]


def test_two_files_that_would_be_one_image_are_refused(tmp_path):
    files = class_folders() | {f"again/{name}": content for name, content in class_folders().items()}
    assert "in the source are both" in says("image_folder", zipped(tmp_path / "z.zip", files), tmp_path)


# Folders.


def test_what_is_no_file_in_a_folder_is_refused_at_once(tmp_path):
    source = samples.image_folder(tmp_path / "source", CLASSES, PER_CLASS)
    pipe = source / "train" / "kind_0" / "pipe.png"
    os.mkfifo(pipe)
    assert "pipe.png is a named pipe" in says("image_folder", source, tmp_path)
    pipe.unlink()
    pipe.symlink_to("nowhere")
    assert "pipe.png: No such file" in says("image_folder", source, tmp_path)
    pipe.unlink()
    (source / "train" / "kind_2").symlink_to("kind_0")
    assert "is a link to a folder" in says("image_folder", source, tmp_path)


def test_a_pipe_in_the_place_of_an_archive_or_a_list_is_refused_at_once(sources, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in SAMPLES:
        assert "pipe" in says(name, tmp_path / "pipe", tmp_path)
    listed = Options(test_list=tmp_path / "pipe")
    assert "pipe is a named pipe" in says("imagenet_r", sources["imagenet_r"], tmp_path, listed)


# CIFAR-100.

CIFAR_FIELDS = {
    "ragged labels": {b"fine_labels": [0, [1], 0, 1, 0, 1]},
    "labels of two dimensions": {b"fine_labels": [[0], [1], [0], [1], [0], [1]]},
    "labels of text": {b"fine_labels": list("010101")},
    "labels beyond the classes": {b"fine_labels": [0, 1, 0, 1, 0, 10**9]},
    "labels beyond numbers": {b"fine_labels": [0, 1, 0, 1, 0, 10**5000]},
    "no labels": {b"fine_labels": [], b"data": np.zeros((0, 3072), np.uint8)},
    "data of text": {b"data": "images"},
    "data of another shape": {b"data": np.zeros((6, 32, 32, 3), np.uint8)},
    "a number for data": {b"data": 7},
}


@pytest.mark.parametrize("damage", CIFAR_FIELDS)
def test_cifars_fields_of_other_types_and_shapes_are_refused(damage, sources, tmp_path):
    def change(members):
        batch = pickle.loads(members["cifar-100-python/train"], encoding="bytes")
        members["cifar-100-python/train"] = pickle.dumps(batch | CIFAR_FIELDS[damage])

    bad = repacked(sources["cifar100"], tmp_path / "bad.tar", change)
    assert "archive" in says("cifar100", bad, tmp_path)


@pytest.mark.parametrize("names", ["ab", 7, [1, 2], None, {"a": 1}])
def test_cifars_class_names_of_other_types_are_refused(names, sources, tmp_path):
    meta = pickle.dumps({b"fine_label_names": names})
    bad = repacked(sources["cifar100"], tmp_path / "bad.tar", lambda m: m.update({"cifar-100-python/meta": meta}))
    assert "fine_label_names are no list of names" in says("cifar100", bad, tmp_path)


ROWS = CLASSES * PER_CLASS
ONE_PIXEL = b"P6 1 1 255\nabc"
PARQUET = {
    "another size": ("img", [{"bytes": image()}] * ROWS, "expected 32 x 32"),
    "one pixel": ("img", [{"bytes": ONE_PIXEL}] * ROWS, "is 1 x 1, expected 32 x 32"),
    "no image": ("img", [{"bytes": None}] * ROWS, "holds struct"),
    "one image missing": ("img", [{"bytes": image()}] + [{"bytes": None}] * (ROWS - 1), "image 0 of"),
    "text for images": ("img", ["text"] * ROWS, "expected structs with the bytes"),
    "paths for images": ("img", [{"path": "a.png"}] * ROWS, "expected structs with the bytes"),
    "text for labels": ("fine_label", ["0"] * ROWS, "expected whole numbers"),
    "fractions for labels": ("fine_label", [0.5] * ROWS, "expected whole numbers"),
    "a label missing": ("fine_label", [0, None] * (ROWS // 2), "expected whole numbers"),
    "huge labels": ("fine_label", [10**9] * ROWS, "labels are none or not within"),
}


def with_parquet(source: Path, folder: Path, change) -> Path:
    folder.mkdir()
    for file in source.glob("*.parquet"):
        pq.write_table(change(pq.read_table(file)), folder / file.name)
    return folder


@pytest.mark.parametrize("damage", PARQUET)
def test_parquet_columns_of_other_types_and_images_of_other_sizes_are_refused(damage, sources, tmp_path):
    name, values, reason = PARQUET[damage]

    def change(table):
        table = table.replace_schema_metadata(None)
        return table.set_column(table.column_names.index(name), name, pa.array(values))

    bad = with_parquet(sources["cifar100 parquet"], tmp_path / "bad", change)
    assert reason in says("cifar100", bad, tmp_path)


def test_parquet_files_without_rows_are_refused(sources, tmp_path):
    bad = with_parquet(sources["cifar100 parquet"], tmp_path / "bad", lambda table: table.slice(0, 0))
    assert "labels are none" in says("cifar100", bad, tmp_path)


METADATA = ["{", "[]", '{"info": []}', '{"info": {"features": {"fine_label": {"names": 5}}}}']


@pytest.mark.parametrize("metadata", METADATA)
def test_parquet_metadata_that_is_no_json_or_of_another_shape_is_refused(metadata, sources, tmp_path):
    def change(table):
        return table.replace_schema_metadata({"huggingface": metadata})

    bad = with_parquet(sources["cifar100 parquet"], tmp_path / "bad", change)
    assert "metadata names no classes" in says("cifar100", bad, tmp_path)


# List files.


@pytest.mark.parametrize("label", ["²", "9" * 5000, "1000000000", "999999999", "-1", "1.0", "٣"])
def test_labels_in_lists_are_some_plain_digits(label, sources, tmp_path):
    for split in ("train", "test"):
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / f"real_{split}.txt").write_text(f"real/kind_0/a.jpg {label}\n")
    zipped(tmp_path / "source" / "real.zip", {"real/kind_0/a.jpg": image()})
    assert label[:9] in says("domainnet", tmp_path / "source", tmp_path, Options(domains=("real",)))

    def change(members):
        name = "CUB_200_2011/image_class_labels.txt"
        members[name] = members[name].replace(b"1 1\n", f"1 {label}\n".encode(), 1)

    bad = repacked(sources["cub200"], tmp_path / "bad.tar", change)
    assert label[:9] in says("cub200", bad, tmp_path)


def test_a_number_that_a_list_gives_twice_is_refused(sources, tmp_path):
    def change(members):
        members["CUB_200_2011/images.txt"] += members["CUB_200_2011/images.txt"].splitlines(keepends=True)[0]

    assert "each number once" in says("cub200", repacked(sources["cub200"], tmp_path / "bad.tar", change), tmp_path)


YAML = ["[" * 10_000, "data: 2024-13-45", "data: {a: b}", "!!int abc", "data: [!!int abc, 1"]


@pytest.mark.parametrize("content", YAML, ids=lambda content: content[:20])
def test_yaml_lists_hold_file_names_and_nothing_else(content, sources, tmp_path):
    (tmp_path / "list.yaml").write_text(content)
    options = Options(test_list=tmp_path / "list.yaml")
    assert "list.yaml" in says("imagenet_r", sources["imagenet_r"], tmp_path, options)


# What is checked first.


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--root", ""), "root of stores must be a folder or a URI"),
        (("--source", ""), "--source"),
        (("--shorter-side", "9" * 400), "--shorter-side must be between 1 and 8192"),
        (("--format", "cub200"), "images.txt"),
        (("--format", ""), "unknown dataset ''"),
        (("--root", "gopher://x"), "data.root gopher://x"),
        (("--root", "s3://"), "cannot read s3://"),
        (("--domains", ""), "--domains is no option of image_folder"),
    ],
)
def test_a_refused_preparation_leaves_nothing_behind(arguments, reason, sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INFLORA_DATA", str(tmp_path / "cache"))
    root = () if arguments[0] == "--root" else ("--root", tmp_path / "a" / "b")
    source = () if arguments[0] == "--source" else ("--source", sources["image_folder"])
    result = inflora("data", "prepare", "image_folder", *source, *root, *arguments)
    assert refused(result) and reason in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "a\nb", "-a", "x" * 300])
def test_a_name_that_leads_elsewhere_is_refused(name, sources, tmp_path):
    command = ("--format", "image_folder", "--source", sources["image_folder"], "--root", tmp_path / "root")
    for result in (inflora("data", "prepare", *command, "--", name), inflora("data", "info", "--", name)):
        assert refused(result) and "a store's name is made of" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_damaged_image_that_is_found_late_leaves_nothing_behind(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("inflora.data.preparation.SHARD_IMAGES", 2)
    files = class_folders() | {"train/b/0.png": b"no image", "train/a/1.png": image(), "train/a/2.png": image()}
    assert "train/b/0.png" in says("image_folder", zipped(tmp_path / "z.zip", files), tmp_path)


@pytest.mark.parametrize("sheet", ["sheet", "sheet.xyz", "no/sheet.png", "folder.png"])
def test_a_contact_sheet_that_cannot_be_written_is_refused_before_a_store_is_prepared(sheet, tmp_path):
    (tmp_path / "folder.png").mkdir()
    result = inflora("data", "info", "digits", "--root", tmp_path / "root", "--sheet", tmp_path / sheet)
    assert refused(result) and "--sheet" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_a_folders_files_are_those_at_any_depth(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"content")
    tree = FolderTree(tmp_path)
    assert (tree.names, tree.sizes, tree.read("a/b/c")) == ({"a/b/c"}, {"a/b/c": 7}, b"content")
    assert open_tree(tmp_path, tmp_path).tree.names == tree.names
