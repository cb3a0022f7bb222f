"""What only Stanford Cars with its MATLAB files, Office-Home and CORe50 do."""

import contextlib
import gzip
import io
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import savemat

from inflora.config import DataSettings, RunConfig, override, parse_config
from inflora.continual import run
from inflora.data import DATASETS, core50, matlab, office_home, prepare_store
from inflora.data.loader import InputFormat, evaluation_batches
from inflora.data.manifest import Manifest, read_manifest
from inflora.data.matlab import variables
from inflora.data.samples import SAMPLES
from inflora.data.source import Options
from inflora.data.store import DataError, open_split
from inflora.data.stream import make_stream
from inflora.metrics import accuracy_matrix
from inflora.runs import train_into
from inflora.serving import load

CLASSES, PER_CLASS = 3, 8
TINY = {
    "name": "vit_tiny_patch16_224",
    "pretrained": False,
    "options": {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """Tiny distributions; read them, do not write to them."""
    made = {}
    for name in ("cars", "vtab", "office_home", "core50"):
        folder = tmp_path_factory.mktemp(name)
        made[name] = SAMPLES[name](folder, CLASSES, PER_CLASS)
    return made


def prepared(name: str, source: Path, root: Path, options: Options = Options()) -> Path:  # noqa: B008 - a value
    return prepare_store(name, DATASETS[name], source, options, str(root), subset=True)


def without(archive: Path, target: Path, part: str) -> Path:
    """A copy of a zip without the members that have ``part`` in their names."""
    with zipfile.ZipFile(archive) as packed, zipfile.ZipFile(target, "w") as kept:
        for member in packed.infolist():
            if part not in member.filename:
                kept.writestr(member, packed.read(member))
    return target


# Stanford Cars.


def saved(variables: dict[str, Any], *, packed: bool = True) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, variables, do_compression=packed)
    return buffer.getvalue()


def annotations(**columns) -> bytes:
    """A MATLAB file of one annotation."""
    kinds = [(name, object) for name in columns]
    return saved({"annotations": np.array([[tuple(columns.values())]], dtype=kinds)})


@pytest.mark.parametrize("packed", [True, False])
def test_matlab_files_say_what_scipy_wrote(packed):
    struct = np.array([[("a.jpg", 3), ("Ärger.jpg", 300)]], dtype=[("fname", object), ("class", object)])
    cells = np.array([["Ram C/V Cargo Van Minivan 2012", "x", np.array([[1.5, 2.5]])]], dtype=object)
    found = variables(
        saved({"annotations": struct, "class_names": cells, "n": np.arange(6).reshape(2, 3)}, packed=packed)
    )
    assert [(row["fname"], row["class"].tolist()) for row in found["annotations"]] == [
        ("a.jpg", [3]),
        ("Ärger.jpg", [300]),
    ]
    *words, numbers = found["class_names"]
    assert (words, numbers.tolist()) == (["Ram C/V Cargo Van Minivan 2012", "x"], [1.5, 2.5])
    assert found["n"].tolist() == [0, 3, 1, 4, 2, 5]  # column after column


WHOLE = {
    packed: saved(
        {"annotations": np.array([[("a.jpg", 3)] * 5], dtype=[("fname", object), ("class", object)])}, packed=packed
    )
    for packed in (True, False)
}


@settings(max_examples=300)
@given(
    packed=st.booleans(),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=4),
    share=st.sampled_from([1.0, 1.0, 0.5]) | st.floats(0, 1),
)
def test_changed_bytes_of_a_matlab_file_are_an_answer_or_a_mistake_in_it(packed, flips, share):
    """Where scipy's reader may crash."""
    content = bytearray(WHOLE[packed])
    for place, mask in flips:
        content[place % len(content)] ^= mask
    with contextlib.suppress(ValueError):
        assert isinstance(variables(bytes(content[: round(share * len(content))])), dict)


def test_a_packed_variable_unpacks_to_a_bounded_size(monkeypatch):
    monkeypatch.setattr(matlab, "MOST_UNPACKED", 1000)
    with pytest.raises(ValueError, match="unpacks to more than 1,000 bytes"):
        variables(saved({"zeros": np.zeros(10_000)}))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no MATLAB file, but long enough to be asked for its version " * 4, "is no MATLAB file with annotations"),
        (annotations(fname="00001.jpg", bbox_x1=1), "annotations without fname and class"),
        (annotations(fname="99999.jpg", **{"class": 1}), r"lists 99999\.jpg, which is not in cars_test/"),
        (annotations(fname="00001.jpg", **{"class": 0}), r"puts 00001\.jpg into class 0 of 3"),
        (annotations(fname="00001.jpg", **{"class": 4}), r"puts 00001\.jpg into class 4 of 3"),
    ],
)
def test_annotations_that_are_not_what_they_must_be_are_one_line(content, says, sources, tmp_path):
    source = tmp_path / "cars"
    shutil.copytree(sources["cars"], source)
    (source / "cars_test_annos_withlabels.mat").write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        prepared("cars", source, tmp_path / "root")
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "root").exists()


def test_one_annotation_is_a_list_of_one(sources, tmp_path):
    source = tmp_path / "cars"
    shutil.copytree(sources["cars"], source)
    (source / "cars_test_annos_withlabels.mat").write_bytes(annotations(fname="00001.jpg", **{"class": 1}))
    with pytest.raises(DataError, match="class 'Maker Model 1' has no test images"):
        prepared("cars", source, tmp_path / "root")


def test_the_devkits_own_annotations_of_test_images_are_not_taken_for_labelled_ones(sources, tmp_path):
    source = tmp_path / "cars"
    shutil.copytree(sources["cars"], source)
    (source / "cars_test_annos_withlabels.mat").rename(source / "cars_test_annos.mat")
    with pytest.raises(DataError, match=r"no file cars_test_annos_withlabels\.mat"):
        prepared("cars", source, tmp_path / "root")


def test_a_damaged_archive_of_cars_is_one_line(sources, tmp_path):
    source = tmp_path / "cars"
    shutil.copytree(sources["cars"], source)
    content = gzip.decompress((source / "cars_train.tgz").read_bytes())
    (source / "cars_train.tgz").write_bytes(gzip.compress(content[: len(content) // 2]))
    with pytest.raises(DataError, match=r"cars_train\.tgz is (cut off|no tar file)"):
        prepared("cars", source, tmp_path / "root")


# Office-Home.


def test_a_fifth_of_every_class_of_every_domain_are_test_images_and_the_seed_draws_them(sources, tmp_path):
    folders = [
        prepared("office_home", sources["office_home"], tmp_path / str(s), Options(split_seed=s)) for s in (0, 1)
    ]
    for folder in folders:
        for split, images in (("train", 8), ("test", 2)):
            held = open_split(folder, split)
            kinds = held.domains * CLASSES + held.labels
            assert kinds.bincount().tolist() == [images] * (CLASSES * len(office_home.DOMAINS))
    first, second = (read_manifest(folder).content_hash for folder in folders)
    assert first != second


@pytest.mark.parametrize("spelling", ["Real_World", "RealWorld"])
def test_copies_spell_the_real_world_otherwise(spelling, sources, tmp_path):
    with zipfile.ZipFile(sources["office_home"]) as packed, zipfile.ZipFile(tmp_path / "copy.zip", "w") as copy:
        for name in packed.namelist():
            copy.writestr(name.replace("Real World", spelling), packed.read(name))
    hashes = {
        read_manifest(prepared("office_home", source, tmp_path / source.stem)).content_hash
        for source in (sources["office_home"], tmp_path / "copy.zip")
    }
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("name", "part", "missing"),
    [("office_home", "/Product/", "Product"), ("core50", "/s7/", "s7"), ("core50", "/s9/", "s9")],
)
def test_a_domain_without_images_is_refused_by_name(name, part, missing, sources, tmp_path):
    bad = without(sources[name], tmp_path / sources[name].name, part)
    with pytest.raises(DataError, match=f"the source holds no images {missing}/"):
        prepared(name, bad, tmp_path / "root")


@pytest.mark.parametrize(
    ("name", "chosen", "says"),
    [
        ("office_home", ("Art", "art"), "--domains: 'art' unknown; known: Art, Clipart, Product, Real World"),
        ("core50", ("s1", "s3"), "--domains: 's3' unknown; known: s1, s2, s4"),  # a test session
        ("core50", ("s1", "s1"), "--domains must name each domain once, got s1, s1"),
    ],
)
def test_only_domains_that_can_be_learnt_can_be_chosen_each_once(name, chosen, says, sources, tmp_path):
    with pytest.raises(DataError, match=says):
        prepared(name, sources[name], tmp_path / "root", Options(domains=chosen))


def test_a_part_of_the_domains_is_no_whole_dataset(sources, tmp_path):
    options = Options(domains=("Art",))
    assert DATASETS["office_home"].read(sources["office_home"], options, tmp_path).official == {"classes": 65}
    whole = DATASETS["office_home"].read(sources["office_home"], Options(), tmp_path).official
    assert whole["train"] + whole["test"] == office_home.IMAGES


# CORe50.


@pytest.fixture(scope="module")
def core50_root(sources, tmp_path_factory) -> Path:
    """A root with a store of three training sessions, in an order of their own."""
    root = tmp_path_factory.mktemp("core50-root")
    prepared("core50", sources["core50"], root, Options(domains=("s11", "s4", "s2")))
    return root


def new_instances(root: Path, **changes) -> RunConfig:
    """A run over the sessions, judged on those that it does not learn."""
    data = {"dataset": "core50", "root": str(root), "scenario": "domain", "tasks": 3, "validation": 0.4}
    config = parse_config(
        {
            "data": data | {"train_on": "train+validation"},
            "backbone": TINY,
            "adapter": {"name": "inflora", "rank": 4},
            "optim": {"epochs": 2, "batch_size": 8, "lr": 5e-3},
            "device": "cpu",
        }
    )
    return override(config, changes)


def test_sessions_arrive_in_the_order_in_which_they_were_chosen_and_test_sessions_never(core50_root):
    manifest = read_manifest(core50_root / "core50")
    assert (manifest.domains, manifest.test_domains) == (["s11", "s4", "s2"], list(core50.TEST_SESSIONS))
    assert set(open_split(core50_root / "core50", "test").domains.tolist()) == {0, 1, 2}
    stream = make_stream(new_instances(core50_root).data, "test")
    train = open_split(core50_root / "core50", "train")
    for index, task in enumerate(stream.tasks):
        assert train.domains[task.train_rows].unique().tolist() == [index]


def test_objects_have_the_names_of_their_kinds(sources, tmp_path):
    names = read_manifest(prepared("core50", sources["core50"], tmp_path)).classes
    assert names == ["plug adapter 1", "plug adapter 2", "plug adapter 3"]
    assert len(core50.KINDS) * 5 == core50.OFFICIAL["classes"]


def test_all_tasks_are_judged_on_the_images_of_all_test_sessions(core50_root):
    stream = make_stream(new_instances(core50_root).data, "test")
    images = len(open_split(core50_root / "core50", "test").labels)
    assert stream.shared_test
    assert [len(task.eval_rows) for task in stream.tasks] == [images] * 3
    assert torch.equal(stream.rows_to_evaluate(stream.tasks), torch.arange(images))
    trial = make_stream(new_instances(core50_root, **{"data.train_on": "train"}).data, "validation")
    assert not trial.shared_test, "while choosing, every session has validation images of its own"
    assert sum(len(task.eval_rows) for task in trial.tasks) == len(trial.rows_to_evaluate(trial.tasks))


def test_right_answers_on_images_that_all_tasks_share(core50_root):
    """Each task counts all of them, with the outputs that it has for their classes; the last model says it again."""
    config = new_instances(core50_root)
    stream, result = make_stream(config.data, "test"), list(run(config, evaluate_on="test"))[-1]
    input_format = InputFormat(config.data, 32, 3, torch.device("cpu"))
    (batch,) = evaluation_batches(stream.evaluate, stream.tasks[0].eval_rows, input_format, 1000)
    with torch.no_grad():
        logits = result.model(batch.images)
    predicted = logits.argmax(1)
    correct = int((predicted % CLASSES == batch.labels).sum())
    for task, counts in zip(stream.tasks, result.state.evaluations[-1], strict=True):
        own = logits[:, task.first_label : task.first_label + CLASSES].argmax(1)
        assert counts.images == len(batch.labels)
        assert counts.correct == correct
        assert counts.correct_in_task == int((own == batch.labels).sum())
        assert counts.right_task == int((predicted // CLASSES == task.index).sum())
    matrix = accuracy_matrix(result.state.evaluations)
    assert all(len(set(row)) == 1 for row in matrix)
    assert result.metrics["acc/final"] == pytest.approx(correct / len(batch.labels))
    assert result.metrics["bwt"] == pytest.approx(sum(matrix[-1][0] - row[0] for row in matrix[:-1]) / 2)
    assert result.metrics["drift/mean"] > 0
    assert "fwt" not in result.metrics, "no session has test images of its own"


def test_a_run_that_is_judged_so_goes_on_from_its_state_and_is_served(core50_root, tmp_path):
    config = new_instances(core50_root)
    whole = list(run(config, evaluate_on="test"))
    rest = list(run(config, whole[0].state, evaluate_on="test"))
    assert rest[-1].state.evaluations == whole[-1].state.evaluations
    train_into(tmp_path, config, "test")
    assert load(tmp_path).class_names == ("plug adapter 1", "plug adapter 2", "plug adapter 3") * 3


def test_joint_training_on_sessions_is_one_task_judged_once(core50_root):
    stream = make_stream(DataSettings(**dict(new_instances(core50_root, **{"data.joint": True}).data)), "test")
    (whole,) = stream.tasks
    images = open_split(core50_root / "core50", "test")
    assert torch.equal(whole.eval_rows, torch.arange(len(images.labels)))
    assert torch.equal(stream.evaluate.labels, images.labels)


def test_new_classes_are_the_class_incremental_stream_of_the_same_store(core50_root):
    settings = DataSettings(dataset="core50", root=str(core50_root), tasks="B1-Inc2")
    stream = make_stream(settings, "test")
    assert [len(task.classes) for task in stream.tasks] == [1, 2]
    assert not stream.shared_test


def test_a_store_without_test_domains_says_nothing_of_them(sources, core50_root, tmp_path):
    """So that an older version reads it, and that an older version's store keeps the hash of its text."""
    folder = prepared("vtab", sources["vtab"], tmp_path)
    assert "test_domains" not in (folder / "manifest.json").read_text()
    manifest = read_manifest(core50_root / "core50")
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_a_store_whose_test_images_are_of_no_test_domain_is_damaged(core50_root, tmp_path):
    shutil.copytree(core50_root / "core50", tmp_path / "core50")
    manifest = read_manifest(tmp_path / "core50").model_copy(update={"test_domains": ["s3"]}).sealed()
    (tmp_path / "core50" / "manifest.json").write_text(manifest.model_dump_json())
    with pytest.raises(DataError, match="its test images have domains outside of its 1"):
        open_split(tmp_path / "core50", "test")
