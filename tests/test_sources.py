"""Every dataset's own distribution, in tiny: read, stored, given back; and what is refused."""

import io
import multiprocessing
import pickle
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from inflora.cli import app
from inflora.config import AugmentSettings, ConfigError, DataSettings, RunConfig, override, parse_config
from inflora.continual import run
from inflora.data import DATASETS, core50, ensure_store, office_home, prepare_store, samples
from inflora.data.archives import FolderTree, open_tree
from inflora.data.augment import Crops, central_views, sample_crops
from inflora.data.domainnet import DOMAINS
from inflora.data.loader import InputFormat, evaluation_batches, training_batches
from inflora.data.pixels import Views
from inflora.data.preparation import prepare
from inflora.data.samples import SAMPLES
from inflora.data.source import Options, labelled, seeded_split
from inflora.data.store import DataError, open_split, read_manifest
from inflora.data.stream import make_stream

CLASSES, PER_CLASS = 4, 8
CPU = torch.device("cpu")
TINY = {
    "name": "vit_tiny_patch16_224",
    "pretrained": False,
    "options": {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2},
}
everywhere = pytest.mark.parametrize("name", SAMPLES)
DOMAINS_OF = {"domainnet": DOMAINS, "office_home": office_home.DOMAINS, "core50": core50.SESSIONS}
OFFICIALLY_COUNTED = [name for name in SAMPLES if name != "image_folder"]
files_only = pytest.mark.parametrize("name", [name for name in SAMPLES if name != "cifar100"])


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """The tiny distribution of every dataset; read them, do not write to them."""
    folder = tmp_path_factory.mktemp("sources")
    made = {}
    for name, write in (SAMPLES | {"cifar100 parquet": samples.cifar100_parquet}).items():
        (folder / name).mkdir()
        made[name] = write(folder / name, CLASSES, PER_CLASS)
    return made


@pytest.fixture(scope="module")
def stores(sources, tmp_path_factory) -> Path:
    """A root with the store of every dataset."""
    root = tmp_path_factory.mktemp("stores")
    for name in SAMPLES:
        prepared(name, sources[name], root)
    return root


def prepared(name: str, source: Path, root: Path, *, dataset: str | None = None, **kwargs) -> Path:
    kwargs = {"subset": True} | kwargs
    return prepare_store(name, DATASETS[dataset or name], source, Options(), str(root), **kwargs)


def refused(*arguments) -> str:
    """The one line with which a command is refused."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in result.stderr, result.stderr
    return errors[0]


# What every dataset does.


def test_every_dataset_that_needs_files_has_a_sample_of_them():
    assert set(SAMPLES) == {name for name, dataset in DATASETS.items() if dataset.needs}


@everywhere
def test_a_distribution_becomes_a_store_with_all_its_images(name, stores):
    manifest = read_manifest(stores / name)
    assert len(manifest.classes) == CLASSES
    assert manifest.domains == list(DOMAINS_OF.get(name, []))
    assert manifest.splits["train"].images == CLASSES * PER_CLASS * max(1, len(manifest.domains))
    for split, facts in manifest.splits.items():
        images = open_split(stores / name, split)
        domains = max(1, len(manifest.domains_of(split)))
        assert min(facts.per_class) > 0
        assert len(images.pixels) == len(images.labels) == facts.images
        assert images.labels.bincount().tolist() == facts.per_class
        assert len(images.domains.unique()) == domains


@everywhere
def test_an_image_has_the_label_of_its_class(name, stores):
    """The samples' classes differ in colour: the brightest channels say which class an image shows."""
    images = open_split(stores / name, "train")
    for row in range(len(images.pixels)):
        label, shown = int(images.labels[row]), images.pixels.array(row).mean((0, 1))
        expected = 0.5 + 0.5 * np.cos(2 * np.pi * (label / CLASSES + np.array([0, 1 / 3, 2 / 3])))
        assert np.corrcoef(shown, expected)[0, 1] > 0.95


@everywhere
def test_the_command_prepares_once_and_then_verifies(name, sources, tmp_path):
    command = ["data", "prepare", name, "--source", sources[name], "--root", tmp_path, "--subset"]
    outputs = []
    for _ in range(2):
        result = CliRunner().invoke(app, [str(part) for part in command])
        assert result.exit_code == 0, result.output
        outputs.append(result.stdout)
        files = {file: file.stat().st_mtime_ns for file in (tmp_path / name).iterdir()}
    assert outputs[0] == outputs[1]
    assert f"content {read_manifest(tmp_path / name).content_hash}" in outputs[0]
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / name).iterdir()} == files
    assert not list(tmp_path.glob(".*.partial"))


@everywhere
def test_the_store_does_not_depend_on_the_order_of_files_on_disk(name, sources, stores, tmp_path):
    source = tmp_path / sources[name].name
    if sources[name].is_dir():
        for file in sorted((f for f in sources[name].rglob("*") if f.is_file()), reverse=True):
            (source / file.relative_to(sources[name])).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, source / file.relative_to(sources[name]))
    elif zipfile.is_zipfile(sources[name]):
        with zipfile.ZipFile(sources[name]) as packed, zipfile.ZipFile(source, "w") as reversed_zip:
            for member in reversed(packed.infolist()):
                reversed_zip.writestr(member, packed.read(member))
    else:
        with tarfile.open(sources[name]) as tar, tarfile.open(source, "w") as reversed_tar:
            for member in reversed(tar.getmembers()):
                reversed_tar.addfile(member, tar.extractfile(member))
    prepared(name, source, tmp_path / "root")
    assert read_manifest(tmp_path / "root" / name).content_hash == read_manifest(stores / name).content_hash


def unpack(archive: Path, folder: Path) -> None:
    if zipfile.is_zipfile(archive):
        zipfile.ZipFile(archive).extractall(folder)
        return
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # not in the first releases of Python 3.11
        tar.extractall(folder)


@everywhere
def test_what_an_archive_unpacks_to_is_a_source_too(name, sources, stores, tmp_path):
    if sources[name].is_dir():
        return
    unpack(sources[name], tmp_path / "unpacked")
    prepared(name, tmp_path / "unpacked", tmp_path / "root")
    assert read_manifest(tmp_path / "root" / name).content_hash == read_manifest(stores / name).content_hash


@everywhere
def test_a_run_learns_from_the_store(name, stores):
    config = parse_config(
        {
            "data": {"dataset": name, "root": str(stores), "tasks": 2, "validation": 0.4},
            "backbone": TINY,
            "optim": {"epochs": 1, "batch_size": 8},
            "device": "cpu",
        }
    )
    assert len(list(run(config))) == 2


@pytest.mark.parametrize("name", OFFICIALLY_COUNTED)
def test_other_numbers_of_images_than_the_official_are_refused_unless_accepted(name, sources, tmp_path):
    line = refused("data", "prepare", name, "--source", sources[name], "--root", tmp_path)
    official = DATASETS[name].read(sources[name], Options(), tmp_path).official
    assert f"expected {official['classes']}" in line and "--subset" in line
    assert not (tmp_path / name).exists()


def test_the_archives_of_cars_unpacked_are_a_source_too(sources, stores, tmp_path):
    (tmp_path / "cars").mkdir()
    for file in sources["cars"].iterdir():
        if file.suffix == ".tgz":
            unpack(file, tmp_path / "cars")
        else:
            shutil.copy(file, tmp_path / "cars")
    prepared("cars", tmp_path / "cars", tmp_path / "root")
    assert read_manifest(tmp_path / "root" / "cars").content_hash == read_manifest(stores / "cars").content_hash


# Forms of CIFAR-100, splits of ImageNet-R, domains of DomainNet.


def test_the_parquet_form_of_cifar100_holds_the_same_images(sources, stores, tmp_path):
    folder = prepared("c100", sources["cifar100 parquet"], tmp_path, dataset="cifar100")
    assert read_manifest(folder).content_hash == read_manifest(stores / "cifar100").content_hash
    assert read_manifest(folder).classes == read_manifest(stores / "cifar100").classes


@pytest.mark.parametrize("suffix", [".txt", ".yaml"])
def test_a_published_list_names_the_test_images(suffix, sources, tmp_path):
    names = [f"imagenet-r/n{label:08}/kind_0.jpg" for label in range(CLASSES)]
    listing = tmp_path / f"test{suffix}"
    listing.write_text("\n".join(names) if suffix == ".txt" else "data:\n" + "".join(f"- {n}\n" for n in names))
    options = Options(test_list=listing)
    folder = prepare_store(
        "imagenet_r", DATASETS["imagenet_r"], sources["imagenet_r"], options, str(tmp_path), subset=True
    )
    assert read_manifest(folder).splits["test"].per_class == [1] * CLASSES
    listing.write_text("data: [n00000000/nothing.jpg]" if suffix == ".yaml" else "n00000000/nothing.jpg")
    with pytest.raises(DataError, match=r"1 files that are not there: n00000000/nothing\.jpg"):
        prepare_store("other", DATASETS["imagenet_r"], sources["imagenet_r"], options, str(tmp_path), subset=True)


def test_the_words_of_the_readme_name_imagenet_rs_classes(stores):
    assert read_manifest(stores / "imagenet_r").classes == [f"kind {label}" for label in range(CLASSES)]


@given(labels=st.lists(st.integers(0, 4), min_size=5, max_size=200), seed=st.integers(0, 99))
def test_a_seeded_split_is_a_fifth_of_all_and_of_every_class_and_stable(labels, seed):
    labels = np.array(labels)
    chosen = seeded_split(labels, 0.2, seed)
    assert chosen.sum() == round(0.2 * len(labels))
    for label in np.unique(labels):
        assert abs(chosen[labels == label].sum() - 0.2 * (labels == label).sum()) <= 1
    assert np.array_equal(chosen, seeded_split(labels, 0.2, seed))


@given(names=st.permutations([f"{kind}/{number}.jpg" for kind in "ab" for number in range(4)]))
def test_the_order_of_the_files_does_not_count(names):
    listed = labelled(["a", "b"], {name: name for name in names})
    assert listed == labelled(["a", "b"], {name: name for name in sorted(names)})


def test_some_domains_can_be_chosen_and_arrive_one_after_another(sources, tmp_path):
    options = Options(domains=("sketch", "real"))
    prepare_store("domainnet", DATASETS["domainnet"], sources["domainnet"], options, str(tmp_path), subset=True)
    settings = DataSettings(dataset="domainnet", root=str(tmp_path), scenario="domain", tasks=2)
    stream = make_stream(settings, "test")
    images = open_split(tmp_path / "domainnet", "train")
    for index, task in enumerate(stream.tasks):
        assert task.classes == tuple(f"kind {label}" for label in range(CLASSES))
        assert images.domains[task.train_rows].unique().tolist() == [index]
        own = stream.train.labels[task.train_rows]
        assert torch.equal(own - task.first_label, images.labels[task.train_rows])
        assert torch.equal(stream.class_of[own], images.labels[task.train_rows])
    joint = make_stream(settings.model_copy(update={"joint": True}), "test")
    assert [task.classes for task in joint.tasks] == [stream.tasks[0].classes]
    assert joint.train.labels.unique().tolist() == list(range(CLASSES))


@pytest.fixture
def two_domains(sources, tmp_path) -> RunConfig:
    """A run over two domains, one after the other."""
    options = Options(domains=("sketch", "real"))
    prepare_store("domainnet", DATASETS["domainnet"], sources["domainnet"], options, str(tmp_path), subset=True)
    data = {"dataset": "domainnet", "root": str(tmp_path), "scenario": "domain", "tasks": 2, "validation": 0.4}
    return parse_config(
        {
            "data": data,
            "backbone": TINY,
            "adapter": {"name": "inflora", "rank": 4},
            "optim": {"epochs": 5, "batch_size": 8, "lr": 5e-3},
            "device": "cpu",
        }
    )


def test_a_class_named_in_another_domains_task_is_right(two_domains):
    """Domain-incremental: each task has outputs of its own for the same classes, and any of them may answer."""
    results = list(run(two_domains))
    last = results[-1].state.evaluations[-1]
    assert [counts.images for counts in last] == [CLASSES * 3, CLASSES * 3]
    assert sum(counts.correct for counts in last) >= sum(counts.correct_in_task for counts in last) - 4
    assert results[-1].metrics["acc/final"] > 1 / CLASSES
    assert results[-1].metrics["fwt"] == pytest.approx(results[0].metrics["acc/ahead"] - 1 / CLASSES)


def test_the_next_domain_is_looked_at_before_it_is_learnt(two_domains):
    """What forward transfer is made of: the classes are known, the domain is not."""
    stream = make_stream(two_domains.data, "validation")
    first = next(run(two_domains))
    input_format = InputFormat(two_domains.data, 32, 3, CPU)
    (batch,) = evaluation_batches(stream.evaluate, stream.tasks[1].eval_rows, input_format, 100)
    with torch.no_grad():
        predicted = first.model(batch.images).argmax(1)
    right = stream.class_of[predicted] == stream.class_of[batch.labels]
    assert first.metrics["acc/ahead"] == pytest.approx(float(right.float().mean()))


@pytest.mark.parametrize("classifier", ["linear", "aligned", "ncm", "lda", "qda", "ranpac"])
def test_every_classifier_learns_domains(classifier, two_domains):
    """A domain's classes are outputs of their own to all of them; those of any domain may answer."""
    settings = {"classifier": classifier} | ({"classifier.features": 50} if classifier == "ranpac" else {})
    metrics = list(run(override(two_domains, settings | {"optim.epochs": 1})))[-1].metrics
    assert {"acc/final", "acc/task_identity", "bwt", "fwt"} <= metrics.keys()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dataset": "domainnet", "scenario": "domain", "tasks": 5}, "one task per domain and domainnet has 6"),
        ({"dataset": "cub200", "scenario": "domain", "tasks": 2}, "cub200 has none, got 2"),
        ({"dataset": "cub200", "tasks": [1, 2]}, "add up to the 4 classes of cub200, got 3"),
    ],
)
def test_tasks_that_the_dataset_does_not_have_are_refused(settings, says, stores):
    with pytest.raises(ConfigError, match=says):
        make_stream(DataSettings.model_validate({"root": str(stores), **settings}), "validation")


def test_tasks_of_unequal_size_are_cut_as_listed(stores):
    stream = make_stream(DataSettings(dataset="cub200", root=str(stores), tasks=(1, 3)), "validation")
    assert [(task.first_label, len(task.classes)) for task in stream.tasks] == [(0, 1), (1, 3)]


def test_an_option_of_another_dataset_is_refused_with_the_datasets_own(sources, tmp_path):
    line = refused("data", "prepare", "imagenet_r", "--source", sources["imagenet_r"], "--domains", "real")
    assert "--domains is no option of imagenet_r; its options: --split-seed, --test-list" in line


# What is damaged, missing or malicious.


def repacked(source: Path, target: Path, change) -> Path:
    """A copy of a tar with its members (name -> content) changed."""
    with tarfile.open(source) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
    change(members)
    with tarfile.open(target, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return target


def image_of(members: dict[str, bytes]) -> str:
    return next(name for name in sorted(members) if name.endswith(".jpg"))


DAMAGE = {
    "corrupt image": lambda m: m.update({image_of(m): b"no image"}),
    "truncated image": lambda m: m.update({image_of(m): m[image_of(m)][:-200]}),
    "listed image missing": lambda m: m.pop(image_of(m)),
    "short list file": lambda m: m.update({"CUB_200_2011/train_test_split.txt": b"1 1\n2 0\n"}),
    "missing list file": lambda m: m.pop("CUB_200_2011/image_class_labels.txt"),
    "bad list line": lambda m: m.update({"CUB_200_2011/images.txt": b"one two three\n"}),
    "class without images": lambda m: m.update(
        {"CUB_200_2011/classes.txt": m["CUB_200_2011/classes.txt"] + b"5 x.Y\n"}
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_archive_is_one_line_and_leaves_no_store(damage, sources, tmp_path):
    named: list[str] = []

    def change(members):
        named.append(image_of(members))
        DAMAGE[damage](members)

    bad = repacked(sources["cub200"], tmp_path / "bad.tar", change)
    line = refused("data", "prepare", "cub200", "--source", bad, "--root", tmp_path / "root", "--subset")
    if "image" in damage.split():
        assert Path(named[0]).name in line
    assert not (tmp_path / "root" / "cub200").exists()


def test_a_tar_with_a_damaged_header_in_the_middle_is_refused(sources, tmp_path):
    content = bytearray(sources["imagenet_r"].read_bytes())
    with tarfile.open(sources["imagenet_r"]) as tar:
        middle = tar.getmembers()[20].offset
    content[middle : middle + 512] = b"x" * 512
    (tmp_path / "bad.tar").write_bytes(content)
    with pytest.raises(DataError, match="cut off or damaged within or after"):
        open_tree(tmp_path / "bad.tar", tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"n00000000/kind_0.jpg: [", b"- 1\n- 2\n"])
def test_a_test_list_that_is_none_is_one_line(content, sources, tmp_path):
    (tmp_path / "list.yaml").write_bytes(content)
    source = ["--source", sources["imagenet_r"], "--root", tmp_path, "--subset"]
    assert "list.yaml" in refused("data", "prepare", "imagenet_r", *source, "--test-list", tmp_path / "list.yaml")


def test_a_domain_may_lack_a_class(sources, tmp_path):
    """DomainNet's painting_train.txt has no t-shirt."""
    shutil.copytree(sources["domainnet"], tmp_path / "source")
    listing = tmp_path / "source" / "painting_train.txt"
    listing.write_text("".join(line for line in listing.open() if not line.endswith(" 1\n")))
    options = Options(domains=("painting", "real"))
    prepare_store("domainnet", DATASETS["domainnet"], tmp_path / "source", options, str(tmp_path), subset=True)
    settings = DataSettings(dataset="domainnet", root=str(tmp_path), scenario="domain", tasks=2)
    stream = make_stream(settings, "test")
    assert 1 not in stream.train.labels[stream.tasks[0].train_rows].tolist()


@pytest.mark.parametrize("share", [0.3, 0.7])
@everywhere
def test_a_cut_off_archive_is_one_line(name, share, sources, tmp_path):
    if sources[name].is_dir():
        return
    content = sources[name].read_bytes()
    (tmp_path / sources[name].name).write_bytes(content[: int(share * len(content))])
    line = refused("data", "prepare", name, "--source", tmp_path / sources[name].name, "--root", tmp_path, "--subset")
    assert sources[name].name in line


@everywhere
def test_another_datasets_archive_is_one_line(name, sources, tmp_path):
    other = "imagenet_r" if name in ("cifar100", "cub200", "image_folder", "domainnet") else "cub200"
    refused("data", "prepare", name, "--source", sources[other], "--root", tmp_path, "--subset")


@everywhere
def test_a_source_that_does_not_exist_is_one_line(name, tmp_path):
    assert "nowhere" in refused("data", "prepare", name, "--source", tmp_path / "nowhere", "--root", tmp_path)


def test_a_pickle_that_would_run_code_is_refused(sources, tmp_path, capsys):
    class Malicious:
        def __reduce__(self):
            return print, ("this code ran",)

    bad = repacked(
        sources["cifar100"],
        tmp_path / "bad.tar",
        lambda m: m.update({"cifar-100-python/train": pickle.dumps({b"data": Malicious()})}),
    )
    line = refused("data", "prepare", "cifar100", "--source", bad, "--root", tmp_path, "--subset")
    assert "builtins.print" in line
    assert "this code ran" not in capsys.readouterr().out


def test_names_that_lead_out_of_the_folder_write_nothing(sources, tmp_path):
    bad = repacked(sources["cub200"], tmp_path / "bad.tar", lambda m: m.update({"../../escaped.txt": b"x"}))
    with pytest.raises(KeyError):
        open_tree(bad, tmp_path).tree.read("escaped.txt")
    prepared("cub200", bad, tmp_path / "deep" / "root")
    assert not list(tmp_path.rglob("escaped.txt"))


def test_a_full_disk_is_one_line_and_no_store(sources, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("inflora.data.preparation.write_shard", full)
    with pytest.raises(DataError, match="No space left on device; the same command goes on"):
        prepared("cub200", sources["cub200"], tmp_path)
    assert not (tmp_path / "cub200").exists()


def test_only_new_shards_are_written_after_an_interruption(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("inflora.data.preparation.SHARD_IMAGES", 6)
    whole = read_manifest(prepared("cub200", sources["cub200"], tmp_path / "whole"))
    seen: list[int] = []

    def interrupt(progress):
        seen.append(progress.done)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared("cub200", sources["cub200"], tmp_path / "root", on_progress=interrupt)
    first = tmp_path / "root" / ".cub200.partial" / "train-00000.arrow"
    written = first.stat().st_mtime_ns
    folder = prepared("cub200", sources["cub200"], tmp_path / "root")
    assert (folder / first.name).stat().st_mtime_ns == written
    assert read_manifest(folder) == whole


def test_a_changed_list_of_test_images_is_another_store(sources, tmp_path):
    listing = tmp_path / "test.txt"
    for number in range(2):
        listing.write_text("".join(f"n{label:08}/kind_{number}.jpg\n" for label in range(CLASSES)))
        arguments = ("imagenet_r", DATASETS["imagenet_r"], sources["imagenet_r"], Options(test_list=listing))
        if number == 0:
            prepare_store(*arguments, str(tmp_path), subset=True)
    with pytest.raises(DataError, match="holds another store"):
        prepare_store(*arguments, str(tmp_path), subset=True)


def test_what_was_begun_from_another_source_is_not_gone_on_with(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("inflora.data.preparation.SHARD_IMAGES", 6)

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared("mine", sources["cub200"], tmp_path, dataset="cub200", on_progress=interrupt)
    folder = prepared("mine", sources["image_folder"], tmp_path, dataset="image_folder")
    assert (
        read_manifest(folder).content_hash
        == read_manifest(prepared("fresh", sources["image_folder"], tmp_path, dataset="image_folder")).content_hash
    )


def test_a_note_that_the_full_disk_cut_off_is_not_believed(sources, tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared("cub200", sources["cub200"], tmp_path, on_progress=interrupt)
    (note,) = (tmp_path / ".cub200.partial").glob("train-*.json")
    note.write_text("")
    assert read_manifest(prepared("cub200", sources["cub200"], tmp_path)).splits["train"].images == CLASSES * PER_CLASS


def test_a_killed_preparation_goes_on(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("inflora.data.preparation.SHARD_IMAGES", 4)
    context = multiprocessing.get_context("fork")
    begun = context.Event()

    def stall(_):
        begun.set()
        time.sleep(60)

    process = context.Process(
        target=prepared, args=("cub200", sources["cub200"], tmp_path), kwargs={"on_progress": stall}
    )
    process.start()
    assert begun.wait(60)
    process.kill()
    process.join()
    assert not (tmp_path / "cub200").exists()
    assert list((tmp_path / ".cub200.partial").glob("*.arrow"))
    assert read_manifest(prepared("cub200", sources["cub200"], tmp_path)).splits["train"].images == CLASSES * PER_CLASS


def test_two_preparations_at_once_make_one_store(sources, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: prepared("cub200", sources["cub200"], tmp_path), range(2)))
    assert both == [tmp_path / "cub200"] * 2
    assert read_manifest(tmp_path / "cub200").splits["train"].images == CLASSES * PER_CLASS


# Image files as training input.


@pytest.mark.parametrize("shorter_side", [None, 32], ids=["encoded", "decoded"])
def test_views_of_image_files_are_those_of_torchvision(shorter_side, sources, tmp_path):
    from torchvision.transforms import functional

    folder = prepared("cub200", sources["cub200"], tmp_path, shorter_side=shorter_side)
    images = open_split(folder, "train")
    rows = torch.arange(len(images.labels))
    sizes = images.pixels.sizes(rows)
    if shorter_side:
        assert sizes.min(1).values.tolist() == [shorter_side] * len(rows)
    training = sample_crops(sizes, AugmentSettings(scale=(0.3, 1.0)), torch.Generator().manual_seed(0))
    views = 255 * images.pixels.start(Views(rows, training), Views(rows, training), 24)().images
    for row, (top, left, height, width) in enumerate(training.boxes.int().tolist()):
        original = Image.fromarray(images.pixels.array(row))
        expected = functional.resized_crop(original, top, left, height, width, [24, 24])
        expected = functional.hflip(expected) if training.flip[row] else expected
        difference = views[row] - torch.from_numpy(np.asarray(expected).copy()).permute(2, 0, 1)
        assert difference.abs().mean() < 0.5
    whole = Views(rows, central_views(sizes, 24, 30))
    views = 255 * images.pixels.start(whole, whole, 24)().images
    for row in rows.tolist():
        expected = functional.center_crop(functional.resize(Image.fromarray(images.pixels.array(row)), 30), [24, 24])
        difference = views[row] - torch.from_numpy(np.asarray(expected).copy()).permute(2, 0, 1)
        assert difference.abs().mean() < 2


def test_an_encoded_store_keeps_the_files_as_they_are(sources, stores):
    tree = FolderTree(sources["image_folder"])
    paths = sorted(name for name in tree.names if name.startswith("train/"))
    images = open_split(stores / "image_folder", "train")
    for row, path in enumerate(paths):
        assert np.array_equal(images.pixels.array(row), np.asarray(Image.open(sources["image_folder"] / path)))


@files_only
def test_the_same_seed_gives_the_same_batches_from_files(name, stores):
    images = open_split(stores / name, "train")
    input_format = InputFormat(DataSettings(), side=16, channels=3, device=CPU)

    def batches() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        return [
            b.images for b in training_batches(images, torch.arange(len(images.labels)), input_format, 7, generator)
        ]

    first, second = batches(), batches()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [len(batch) for batch in first[:2]] == [7, 7]


@everywhere
def test_a_worker_without_a_share_of_a_small_batch_gets_an_empty_one(name, stores, monkeypatch):
    monkeypatch.setattr("inflora.distributed.rank", lambda: 1)
    monkeypatch.setattr("inflora.distributed.world_size", lambda: 2)
    images = open_split(stores / name, "train")
    input_format = InputFormat(DataSettings(), side=16, channels=3, device=CPU)
    batches = list(training_batches(images, torch.arange(5), input_format, 4, torch.Generator()))
    assert [tuple(batch.images.shape) for batch in batches] == [(2, 3, 16, 16), (0, 3, 16, 16)]
    assert sum(len(batch.images) for batch in evaluation_batches(images, torch.arange(1), input_format, 4)) == 0


def test_the_next_batches_are_made_while_one_is_computed_on(stores, monkeypatch):
    """Waiting for images is part of a pass only where they are made more slowly than used."""
    images = open_split(stores / "cub200", "train")
    view, side = type(images.pixels)._view, 16

    def slowly(*args):
        time.sleep(0.01)
        return view(*args)

    monkeypatch.setattr(type(images.pixels), "_view", slowly)
    input_format = InputFormat(DataSettings(), side=side, channels=3, device=CPU)
    waits = []
    for batch in training_batches(images, torch.arange(20), input_format, 4, torch.Generator()):
        waits.append(batch.waited())
        time.sleep(0.1)  # the model computes
    assert max(waits[1:]) < 0.05


# Stores elsewhere.


@pytest.fixture(params=["file", "s3"])
def uri(request, tmp_path) -> str:
    return f"file://{tmp_path}/bucket" if request.param == "file" else f"{request.getfixturevalue('bucket')}/stores"


def test_a_store_at_a_uri_is_fetched_once_and_used(uri, sources, tmp_path, monkeypatch):
    monkeypatch.setenv("INFLORA_DATA", str(tmp_path / "here"))
    prepare_store("cub200", DATASETS["cub200"], sources["cub200"], Options(), uri, subset=True)
    shutil.rmtree(tmp_path / "here")
    folder = ensure_store("cub200", uri)
    assert folder.is_relative_to(tmp_path / "here")
    fetched = folder.stat().st_mtime_ns
    assert ensure_store("cub200", uri) == folder
    assert folder.stat().st_mtime_ns == fetched
    assert len(open_split(folder, "test").labels) == CLASSES * PER_CLASS


def test_another_store_at_a_uri_is_neither_overwritten_nor_taken_for_the_old_one(uri, sources, tmp_path, monkeypatch):
    arguments = ("imagenet_r", DATASETS["imagenet_r"], sources["imagenet_r"])
    monkeypatch.setenv("INFLORA_DATA", str(tmp_path / "one"))
    first = prepare_store(*arguments, Options(split_seed=0), uri, subset=True)
    monkeypatch.setenv("INFLORA_DATA", str(tmp_path / "two"))
    with pytest.raises(DataError, match="holds another store"):
        prepare_store(*arguments, Options(split_seed=1), uri, subset=True)
    assert read_manifest(ensure_store("imagenet_r", uri)) == read_manifest(first)


def test_a_store_damaged_at_its_uri_is_not_taken(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("INFLORA_DATA", str(tmp_path / "here"))
    root = f"file://{tmp_path}/bucket"
    prepare_store("cub200", DATASETS["cub200"], sources["cub200"], Options(), root, subset=True)
    shutil.rmtree(tmp_path / "here")
    file = tmp_path / "bucket" / "cub200" / "train-00000.arrow"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"the store at .* is damaged: cub200/train.* has changed"):
        ensure_store("cub200", root)
    with pytest.raises(DataError, match="no dataset store digits in"):
        ensure_store("digits", root)
    with pytest.raises(ConfigError, match=r"data\.root gopher://x"):
        ensure_store("digits", "gopher://x")


# A look at a store.


@everywhere
def test_info_shows_counts_hashes_and_a_contact_sheet(name, stores, tmp_path):
    sheet = tmp_path / "sheet.png"
    result = CliRunner().invoke(app, ["data", "info", name, "--root", str(stores), "--sheet", str(sheet), "--classes"])
    assert result.exit_code == 0, result.output
    manifest = read_manifest(stores / name)
    assert manifest.content_hash in result.stdout
    assert all(class_name in result.stdout for class_name in manifest.classes)
    with Image.open(sheet) as image:
        assert image.height == CLASSES * 48 and np.asarray(image).std() > 10


def test_a_crop_stays_within_images_of_different_sizes(stores):
    images = open_split(stores / "cub200", "train")
    sizes = images.pixels.sizes(torch.arange(len(images.labels)))
    crops: Crops = sample_crops(sizes, AugmentSettings(), torch.Generator().manual_seed(0))
    assert len({tuple(size) for size in sizes.tolist()}) > 1
    assert (crops.boxes[:, :2] + crops.boxes[:, 2:] <= sizes).all()


def test_preparing_arrays_refuses_a_shorter_side(sources, tmp_path):
    with pytest.raises(DataError, match="--shorter-side is for datasets of image files"):
        prepare(tmp_path / "c", "c", DATASETS["cifar100"], sources["cifar100"], Options(), shorter_side=8, subset=True)


@pytest.mark.e2e
def test_a_full_size_cifar100_is_prepared_loaded_and_augmented_within_two_gigabytes(tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "source").mkdir()
    names = [f"class {label}".encode() for label in range(100)]
    (tmp_path / "source" / "meta").write_bytes(pickle.dumps({b"fine_label_names": names}))
    for split, count in (("train", 50_000), ("test", 10_000)):
        data = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        batch = {b"data": data, b"fine_labels": (np.arange(count) % 100).tolist()}
        (tmp_path / "source" / split).write_bytes(pickle.dumps(batch, protocol=2))
    script = f"""
import torch
from pathlib import Path
from inflora.config import DataSettings
from inflora.data import DATASETS, prepare_store
from inflora.data.loader import InputFormat, evaluation_batches, training_batches
from inflora.data.source import Options
from inflora.data.stream import make_stream
prepare_store("cifar100", DATASETS["cifar100"], Path({str(tmp_path / "source")!r}), Options(), {str(tmp_path)!r})
settings = DataSettings(root={str(tmp_path)!r}, dataset="cifar100", tasks=10)
stream = make_stream(settings, "test")
input_format = InputFormat(settings, 224, 3, torch.device("cpu"))
rows = stream.tasks[0].train_rows
batches = training_batches(stream.train, rows, input_format, 128, torch.Generator())
seen = sum(len(next(batches).images) for _ in range(8))
evaluated = evaluation_batches(stream.evaluate, stream.tasks[0].eval_rows[:512], input_format, 256)
seen += sum(len(batch.images) for batch in evaluated)
# Not getrusage's ru_maxrss: a process born from a large one inherits that one's peak.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(len(rows), seen, int(peak.split()[1]) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    rows, seen, gigabytes = done.stdout.split()
    assert (int(rows), int(seen)) == (4500, 8 * 128 + 512)
    assert float(gigabytes) < 2


# Generated images.


@pytest.mark.parametrize(("name", "images"), [("strokes", (800, 600)), ("woven", (1440, 960))])
def test_generated_images_need_no_source_and_are_the_same_whenever_they_are_drawn(name, images, tmp_path):
    first, second = (ensure_store(name, str(tmp_path / each)) for each in ("one", "two"))
    manifest = read_manifest(first)
    assert tuple(manifest.splits[split].images for split in ("train", "test")) == images
    assert manifest.content_hash == read_manifest(second).content_hash


def test_woven_is_what_the_recorded_numbers_were_measured_on(tmp_path):
    assert read_manifest(ensure_store("woven", str(tmp_path))).content_hash == "61769aa8da39a6fa"
