"""The store, the stream of tasks, and augmented batches."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from PIL import Image
from torchvision.transforms import RandomResizedCrop, functional

from inflora.config import AugmentSettings, ConfigError, DataSettings
from inflora.data import ensure_store, prepare_store
from inflora.data.augment import Crops, central_views, crop_and_resize, sample_crops
from inflora.data.loader import InputFormat, evaluation_batches, seeded, training_batches
from inflora.data.preparation import prepare
from inflora.data.source import Arrays, Dataset, Options, Source
from inflora.data.store import DataError, Manifest, open_split, read_manifest, verify_split
from inflora.data.stream import class_order, make_stream, rows_hash, split_validation
from inflora.data.tasks import task_sizes


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_images(count: int = 9, seed: int = 0, size: tuple[int, int, int] = (4, 5, 3)) -> Arrays:
    random = np.random.default_rng(seed)
    return Arrays(random.integers(0, 256, (count, *size), dtype=np.uint8), np.arange(count) % 3)


def store_of(folder: Path, train: Arrays, test: Arrays | None = None, classes: int = 3) -> Manifest:
    """Prepare ``folder`` from arrays; the name of the source is that of its content."""
    origin = hashlib.sha256(train.pixels.tobytes()).hexdigest()
    source = Source(origin, tuple("abcdef"[:classes]), {"train": train, "test": test or train})
    return prepare(folder, "made-up", Dataset(lambda *_: source, needs=None), Path(), Options())


def a_store(folder: Path, seed: int = 0) -> Manifest:
    return store_of(folder, some_images(9, seed), some_images(6, seed + 1))


TRAIN = "train-00000.arrow"


# The store.


@given(
    pixels=st_numpy.arrays(
        np.uint8, st_numpy.array_shapes(min_dims=4, max_dims=4, min_side=2, max_side=5), elements=st.integers(0, 255)
    )
)
def test_a_store_gives_back_the_images_and_labels_written_into_it(pixels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("round") / "store"
    labels = np.arange(len(pixels)) % 2
    store_of(folder, Arrays(pixels, labels), classes=2)
    images = open_split(folder, "train")
    assert np.array_equal(images.pixels.tensor.numpy(), pixels)
    assert images.labels.tolist() == labels.tolist()


def test_a_store_says_what_is_in_it(tmp_path):
    written = a_store(tmp_path / "store")
    read = read_manifest(tmp_path / "store")
    assert read == written
    assert (read.form, read.channels, read.classes) == ("raw", 3, ["a", "b", "c"])
    assert (read.splits["train"].images, read.splits["test"].per_class) == (9, [2, 2, 2])
    verify_split(tmp_path / "store", "train")


def test_the_content_hash_is_that_of_the_images_whatever_the_store_is_called(tmp_path):
    hashes = [a_store(tmp_path / name, seed).content_hash for name, seed in (("one", 0), ("two", 0), ("three", 1))]
    assert hashes[0] == hashes[1] != hashes[2]


def test_raw_images_are_mapped_from_the_file_not_copied(tmp_path):
    pixels = np.zeros((2000, 32, 32, 3), dtype=np.uint8)
    store_of(tmp_path / "store", Arrays(pixels, np.zeros(2000, dtype=int)), classes=1)
    before = pa.total_allocated_bytes()
    images = open_split(tmp_path / "store", "train")
    assert pa.total_allocated_bytes() - before < pixels.nbytes / 10
    with (tmp_path / "store" / TRAIN).open("r+b") as file:
        file.seek(-pixels.nbytes // 2, 2)
        file.write(b"\xff")
    assert int(images.pixels.tensor.sum()) == 255


def test_a_folder_without_a_manifest_is_not_a_store(tmp_path):
    a_store(tmp_path / "digits")
    (tmp_path / "digits" / "manifest.json").unlink()
    with pytest.raises(DataError, match="no dataset store in"):
        read_manifest(tmp_path / "digits")
    with pytest.raises(DataError):
        ensure_store("digits", str(tmp_path))


def test_preparing_the_same_store_twice_verifies_it_and_another_one_is_refused(tmp_path):
    assert a_store(tmp_path / "store") == a_store(tmp_path / "store")
    with pytest.raises(DataError, match="holds another store"):
        a_store(tmp_path / "store", seed=5)
    verify_split(tmp_path / "store", "train")
    (tmp_path / "store" / TRAIN).write_bytes(b"damaged")
    with pytest.raises(DataError, match="has changed since it was prepared"):
        a_store(tmp_path / "store")


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    a_store(tmp_path / "store")
    (tmp_path / "store" / "test-00000.arrow").unlink()
    for read in (open_split, verify_split):
        with pytest.raises(DataError, match=r"test-00000\.arrow"):
            read(tmp_path / "store", "test")
    assert len(open_split(tmp_path / "store", "train").labels) == 9


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_an_error_that_names_it(share, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut") / "store"
    a_store(folder)
    file = folder / TRAIN
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(DataError, match=r"train-00000\.arrow"):
        open_split(folder, "train")


def test_a_file_of_another_length_than_the_manifest_says_is_refused(tmp_path):
    a_store(tmp_path / "store")
    shutil.copy(tmp_path / "store" / "test-00000.arrow", tmp_path / "store" / TRAIN)
    with pytest.raises(DataError, match="has changed since it was prepared"):
        open_split(tmp_path / "store", "train")


def test_a_changed_pixel_is_noticed(tmp_path):
    a_store(tmp_path / "store")
    file = tmp_path / "store" / TRAIN
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="has changed since it was prepared"):
        verify_split(tmp_path / "store", "train")


@pytest.mark.parametrize("more", ["", '"compression": "none", '], ids=["same fields", "new fields"])
def test_a_store_of_another_format_is_refused_by_its_number(more, tmp_path):
    a_store(tmp_path / "store")
    file = tmp_path / "store" / "manifest.json"
    file.write_text(file.read_text().replace('"format": 3,', f'"format": 1, {more}'))
    with pytest.raises(DataError, match="store format 1, expected 3; remove it and prepare it again"):
        read_manifest(tmp_path / "store")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 3}', b"\xff\xfe"])
def test_a_damaged_manifest_is_an_error_that_names_it(content, tmp_path):
    a_store(tmp_path / "store")
    (tmp_path / "store" / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"is damaged: manifest\.json"):
        read_manifest(tmp_path / "store")


def test_an_unknown_dataset_is_refused_and_the_known_ones_are_listed(tmp_path):
    a_store(tmp_path / "flowers")
    with pytest.raises(ConfigError, match=r"unknown data\.dataset 'mnist'; known: .*digits.*flowers"):
        ensure_store("mnist", str(tmp_path))


def test_a_dataset_that_needs_its_files_says_how_to_prepare_it(tmp_path):
    with pytest.raises(ConfigError, match=rf"prepare cifar100 --source PATH --root {tmp_path} \(PATH: cifar"):
        ensure_store("cifar100", str(tmp_path))


def test_a_store_that_is_there_is_not_prepared_again(digits):
    before = (digits / TRAIN).stat()
    assert ensure_store("digits", str(digits.parent)) == digits
    after = (digits / TRAIN).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)  # reading changes st_atime


def test_the_digits_are_the_1797_scans_with_every_class_in_both_splits(digits):
    manifest = read_manifest(digits)
    assert sum(split.images for split in manifest.splits.values()) == 1797
    assert all(len(split.per_class) == 10 and min(split.per_class) > 0 for split in manifest.splits.values())
    images = open_split(digits, "train")
    assert images.pixels.tensor.shape[1:] == (8, 8, 1)
    assert int(images.pixels.tensor.max()) == 255


# The split and the stream.

labels_strategy = st.lists(st.integers(0, 5), min_size=1, max_size=40).map(lambda few: torch.tensor(few * 2))
split_arguments = {"labels": labels_strategy, "fraction": st.floats(0.01, 0.99), "seed": st.integers(0, 2**31)}


@given(**split_arguments)
def test_training_and_validation_rows_are_disjoint_and_complete(labels, fraction, seed):
    train, held_out = split_validation(labels, fraction, seed)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(len(labels)))


@given(**split_arguments)
def test_every_class_gives_its_share_and_at_least_one_image_to_each_side(labels, fraction, seed):
    _, held_out = split_validation(labels, fraction, seed)
    for label in labels.unique():
        of_class = int((labels == label).sum())
        given_up = int((labels[held_out] == label).sum())
        assert 1 <= given_up <= of_class - 1
        assert abs(given_up - fraction * of_class) <= 1


@given(**split_arguments)
def test_the_same_seed_gives_the_same_split_and_the_same_hash(labels, fraction, seed):
    first, second = split_validation(labels, fraction, seed), split_validation(labels, fraction, seed)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert rows_hash(*first) == rows_hash(*second)


def test_another_seed_gives_another_split_and_another_hash():
    labels = torch.arange(100) % 2
    first, second = split_validation(labels, 0.3, 0), split_validation(labels, 0.3, 1)
    assert not torch.equal(first[1], second[1])
    assert rows_hash(*first) != rows_hash(*second)


def test_the_hash_tells_the_sides_of_a_split_apart_and_ignores_the_order_within():
    a, b = torch.tensor([3, 1]), torch.tensor([2])
    assert rows_hash(a, b) != rows_hash(b, a)
    assert rows_hash(a, b) != rows_hash(torch.tensor([3]), torch.tensor([1, 2]))
    assert rows_hash(a, b) == rows_hash(a.flip(0), b)


def test_the_only_image_of_a_class_is_for_training():
    train, held_out = split_validation(torch.tensor([0, 0, 7]), 0.5, 0)
    assert 2 in train.tolist() and len(held_out) == 1


def test_the_natural_class_order_is_the_datasets_and_a_seeded_one_a_fixed_permutation():
    assert class_order(10, None) == tuple(range(10))
    assert class_order(10, 1993) == class_order(10, 1993) != class_order(10, 1)
    assert sorted(class_order(10, 1993)) == list(range(10))


def test_the_order_of_the_fields_tools_is_drawn_as_they_draw_it(digits):
    order = class_order(100, None, "pycil-1993")
    assert order[:10] == (68, 56, 78, 8, 23, 84, 90, 65, 74, 76)
    np.random.seed(7)
    assert class_order(200, None, "pycil-7") == tuple(np.random.permutation(200).tolist())
    stream = make_stream(DataSettings(order="pycil-1993"), "validation")
    assert stream.class_order == class_order(10, None, "pycil-1993") != class_order(10, 1993)
    assert [name for task in stream.tasks for name in task.classes] == [str(c) for c in stream.class_order]


@pytest.mark.parametrize("order_seed", [None, 1993])
@pytest.mark.parametrize("tasks", [1, 2, 5, 10])
def test_tasks_divide_the_classes_in_order_and_the_images_by_class(tasks, order_seed, digits):
    stream = make_stream(DataSettings(tasks=tasks, order_seed=order_seed), "validation")
    size = 10 // tasks
    original = open_split(digits, "train").labels
    assert [name for task in stream.tasks for name in task.classes] == [str(c) for c in stream.class_order]
    for index, task in enumerate(stream.tasks):
        assert (task.index, task.first_label) == (index, index * size)
        for rows in (task.train_rows, task.eval_rows):
            assert stream.train.labels[rows].unique().tolist() == list(range(index * size, (index + 1) * size))
            assert {str(label) for label in original[rows].tolist()} == set(task.classes)


def test_the_tasks_use_every_training_image_exactly_once(digits):
    stream = make_stream(DataSettings(), "validation")
    rows = torch.cat([rows for task in stream.tasks for rows in (task.train_rows, task.eval_rows)])
    assert rows.sort().values.tolist() == list(range(len(stream.train.labels)))


def test_final_training_sees_the_whole_test_split_and_if_asked_the_validation_images_too(digits):
    manifest = read_manifest(digits)
    stream = make_stream(DataSettings(train_on="train+validation"), "test")
    assert sum(len(task.train_rows) for task in stream.tasks) == manifest.splits["train"].images
    assert sum(len(task.eval_rows) for task in stream.tasks) == manifest.splits["test"].images
    assert torch.equal(stream.evaluate.pixels.tensor, open_split(digits, "test").pixels.tensor)


def test_the_split_hash_does_not_depend_on_what_is_evaluated(digits):
    hashes = {make_stream(DataSettings(), on).split_hash for on in ("validation", "test")}
    assert len(hashes) == 1
    assert make_stream(DataSettings(split_seed=1), "validation").split_hash not in hashes


def test_training_on_the_validation_images_leaves_nothing_to_validate_on(digits):
    with pytest.raises(ConfigError, match="leaves no validation images"):
        make_stream(DataSettings(train_on="train+validation"), "validation")


@pytest.mark.parametrize("damage", ["deleted", "garbage"])
def test_the_test_split_is_not_opened_for_validation(damage, digits, tmp_path):
    shutil.copytree(digits, tmp_path / "digits")
    file = tmp_path / "digits" / "test-00000.arrow"
    file.unlink() if damage == "deleted" else file.write_bytes(b"garbage")
    assert len(make_stream(DataSettings(root=str(tmp_path)), "validation").tasks) == 5
    with pytest.raises(DataError, match=r"test-00000\.arrow"):
        make_stream(DataSettings(root=str(tmp_path)), "test")


@pytest.mark.parametrize("tasks", [3, 4, 11])
def test_tasks_that_do_not_divide_the_classes_are_refused_with_the_numbers_that_do(tasks, digits):
    with pytest.raises(ConfigError, match=rf"10 classes of digits \(1, 2, 5, 10\), got {tasks}"):
        make_stream(DataSettings(tasks=tasks), "validation")


@pytest.mark.parametrize(("empty", "images"), [("train", "training"), ("test", "evaluation")])
def test_a_task_without_images_is_refused_before_anything_is_learnt(empty, images, tmp_path):
    """A dataset may have classes without images in a split; a whole task of them cannot be learnt, or judged."""
    labels = {split: np.array([0, 0, 1, 1] if split == empty else [0, 0, 1, 1, 2, 2]) for split in ("train", "test")}
    splits = {split: Arrays(np.zeros((len(own), 8, 8, 1), dtype=np.uint8), own) for split, own in labels.items()}
    source = Source("holes", ("a", "b", "c"), splits, gaps=True)
    prepare_store("holes", Dataset(lambda *_: source, needs=None), tmp_path, Options(), str(tmp_path))
    settings = DataSettings(dataset="holes", root=str(tmp_path), tasks=3, train_on="train+validation")
    with pytest.raises(ConfigError, match=rf"task 2 of data\.tasks \(c\) has no {images} images in holes"):
        make_stream(settings, "test")
    assert len(make_stream(settings.model_copy(update={"tasks": (1, 2)}), "test").tasks) == 2


def test_a_joint_stream_is_one_task_with_the_very_images_of_all(digits):
    stream = make_stream(DataSettings(order_seed=3), "validation")
    (whole,) = make_stream(DataSettings(order_seed=3, joint=True), "validation").tasks
    assert whole.classes == tuple(str(c) for c in stream.class_order)
    for rows in ("train_rows", "eval_rows"):
        assert torch.equal(getattr(whole, rows), torch.cat([getattr(task, rows) for task in stream.tasks]))


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"tasks": 5}, (2, 2, 2, 2, 2)),
        ({"tasks": (7, 3)}, (7, 3)),
        ({"tasks": 5, "joint": True}, (10,)),
        ({"tasks": (7, 3), "joint": True}, (10,)),
        ({"tasks": 3, "scenario": "domain"}, (10, 10, 10)),
    ],
)
def test_the_sizes_of_tasks_are_known_without_their_images(settings, sizes):
    """A saved state is checked by them where its dataset is not at hand."""
    assert task_sizes(DataSettings(**settings), 10) == sizes
    assert DataSettings(**settings).task_count == len(sizes)


# Crops.


def torchvision_boxes(count: int, height: int, width: int, settings: AugmentSettings) -> torch.Tensor:
    """Boxes (count x 4: top, left, height, width) as torchvision draws them."""
    image = torch.empty(1, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        boxes = [RandomResizedCrop.get_params(image, list(settings.scale), list(settings.ratio)) for _ in range(count)]
    return torch.tensor(boxes, dtype=torch.float64)


def our_boxes(count: int, height: int, width: int, settings: AugmentSettings) -> torch.Tensor:
    return sample_crops(torch.tensor([[height, width]]).expand(count, 2), settings, generator()).boxes.double()


@pytest.mark.parametrize(
    ("height", "width", "settings"),
    [
        (8, 8, AugmentSettings()),
        (32, 32, AugmentSettings(scale=(0.6, 1.0))),
        (20, 60, AugmentSettings(scale=(0.5, 1.0))),
        (40, 8, AugmentSettings(scale=(0.9, 1.0), ratio=(0.9, 1.1))),
    ],
    ids=["small square", "mild", "often no attempt fits", "never does one fit"],
)
def test_boxes_are_distributed_as_torchvisions(height, width, settings):
    count = 4000
    ours, theirs = (draw(count, height, width, settings) for draw in (our_boxes, torchvision_boxes))
    # Two samples of one distribution: each cumulative share differs by less than the Kolmogorov-Smirnov bound,
    # which it would exceed by chance once in 10,000 times.
    bound = 2.23 * (2 / count) ** 0.5
    for column in (*range(4), "area"):
        mine, other = (b[:, 2] * b[:, 3] if column == "area" else b[:, column] for b in (ours, theirs))
        values = torch.cat([mine, other]).unique()
        shares = [(sample[:, None] <= values).double().mean(0) for sample in (mine, other)]
        assert (shares[0] - shares[1]).abs().max() <= bound


@given(
    height=st.integers(4, 40),
    width=st.integers(4, 40),
    low=st.floats(0.01, 1),
    ratio=st.tuples(*[st.floats(-7, 7).map(lambda power: 2**power)] * 2).map(sorted),
    seed=st.integers(0, 999),
)
def test_every_box_is_made_of_whole_pixels_inside_the_image(height, width, low, ratio, seed):
    settings = AugmentSettings(scale=(low, 1.0), ratio=tuple(ratio))
    boxes = sample_crops(torch.tensor([[height, width]]).expand(50, 2), settings, generator(seed)).boxes
    for start, length, size in ((boxes[:, 0], boxes[:, 2], height), (boxes[:, 1], boxes[:, 3], width)):
        assert torch.equal(start, start.round())
        assert torch.equal(length, length.round())
        assert start.min() >= 0
        assert length.min() >= 1
        assert (start + length).max() <= size


def test_half_of_the_images_are_flipped_or_none():
    sizes = torch.full((4000, 2), 8)
    flips = sample_crops(sizes, AugmentSettings(), generator()).flip
    assert set(flips.tolist()) == {0.0, 1.0}
    assert abs(float(flips.mean()) - 0.5) < 4 * 0.5 / 4000**0.5
    assert not sample_crops(sizes, AugmentSettings(flip=False), generator()).flip.any()


def torchvision_view(pixels: np.ndarray, box: tuple[int, int, int, int], side: int, flip: bool) -> torch.Tensor:
    """One image (H, W, 3), its box resized by torchvision's own transform of PIL images: (3, S, S) in 0..255."""
    view = functional.resized_crop(Image.fromarray(pixels), *box, [side, side])
    return torch.from_numpy(np.asarray(functional.hflip(view) if flip else view).copy()).permute(2, 0, 1).float()


boxes_in_images = st.tuples(st.integers(6, 60), st.integers(6, 60)).flatmap(
    lambda size: st.tuples(
        st.just(size),
        st.tuples(st.integers(0, size[0] - 3), st.integers(0, size[1] - 3)).flatmap(
            lambda at: st.tuples(*map(st.just, at), st.integers(3, size[0] - at[0]), st.integers(3, size[1] - at[1]))
        ),
    )
)


@given(size_and_box=boxes_in_images, side=st.sampled_from([8, 24, 40]), flip=st.booleans(), seed=st.integers(0, 9))
def test_pixels_are_those_of_torchvisions_own_transform(size_and_box, side, flip, seed):
    size, box = size_and_box
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)  # noise: the hardest to resize
    crops = Crops(torch.tensor([box]).float(), torch.tensor([float(flip)]), cut=True)
    ours = 255 * crop_and_resize(torch.from_numpy(pixels)[None], crops, side)[0]
    assert (ours - torchvision_view(pixels, box, side, flip)).abs().mean() < 1  # both round to whole grey levels


@given(height=st.integers(20, 90), width=st.integers(20, 90), resize=st.integers(16, 40), seed=st.integers(0, 9))
def test_evaluation_sees_what_torchvisions_resize_and_central_crop_give(height, width, resize, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = functional.center_crop(functional.resize(Image.fromarray(pixels), resize), [16, 16])
    crops = central_views(torch.tensor([[height, width]]), 16, resize)
    ours = 255 * crop_and_resize(torch.from_numpy(pixels)[None], crops, 16)[0]
    theirs = torch.from_numpy(np.asarray(expected).copy()).permute(2, 0, 1)
    assert (ours - theirs).abs().mean() < 1


def test_the_whole_image_at_its_own_size_is_the_image():
    pixels = torch.from_numpy(some_images(3, size=(6, 6, 2)).pixels)
    view = crop_and_resize(pixels, central_views(torch.full((3, 2), 6), 6, 6), 6)
    torch.testing.assert_close(view, pixels.permute(0, 3, 1, 2) / 255, atol=1e-6, rtol=0)


# Batches.


def input_of(**settings) -> InputFormat:
    return InputFormat(DataSettings(**settings), side=8, channels=1, device=torch.device("cpu"))


def one_pass(digits, seed: int = 0, rows=range(50), **settings):
    images = open_split(digits, "train")
    return list(training_batches(images, torch.tensor(rows), input_of(**settings), 16, generator(seed)))


def test_a_pass_shows_every_image_once_in_batches_of_the_given_size(digits):
    labels = open_split(digits, "train").labels
    batches = one_pass(digits, augment="none")
    assert [len(batch.labels) for batch in batches] == [16, 16, 16, 2]
    assert all(batch.share == 1 for batch in batches)
    assert torch.cat([b.labels for b in batches]).sort().values.tolist() == labels[:50].sort().values.tolist()


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(digits):
    same = zip(one_pass(digits, 0), one_pass(digits, 0), strict=True)
    assert all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in same)
    assert not torch.equal(one_pass(digits, 0)[0].images, one_pass(digits, 1)[0].images)


def test_without_augmentation_the_images_are_the_stored_ones(digits):
    images = open_split(digits, "train")
    (batch,) = one_pass(digits, rows=range(5, 6), augment="none")
    torch.testing.assert_close(batch.images[0, 0], images.pixels.tensor[5, :, :, 0] / 255, atol=1e-6, rtol=0)


def test_augmentation_changes_the_images_from_pass_to_pass(digits):
    first, second = (one_pass(digits, seed, rows=range(5, 6)) for seed in (0, 1))
    assert not torch.equal(first[0].images, second[0].images)


def test_images_are_shifted_and_scaled_as_configured(digits):
    (plain,), (scaled,) = (
        one_pass(digits, rows=range(3), augment="none", **settings) for settings in ({}, {"mean": 0.5, "std": 0.25})
    )
    torch.testing.assert_close(scaled.images, (plain.images - 0.5) / 0.25)


def test_grey_images_are_repeated_for_a_backbone_that_reads_colours(digits):
    images = open_split(digits, "train")
    (batch,) = evaluation_batches(images, torch.arange(4), InputFormat(DataSettings(), 8, 3, torch.device("cpu")), 16)
    assert batch.images.shape == (4, 3, 8, 8)
    assert torch.equal(batch.images[:, 0], batch.images[:, 2])


def test_evaluation_shows_the_rows_in_order_without_augmentation(digits):
    images = open_split(digits, "train")
    batches = list(evaluation_batches(images, torch.arange(20, 60), input_of(), 16))
    assert torch.equal(torch.cat([b.labels for b in batches]), images.labels[20:60])
    shown = torch.cat([b.images for b in batches])[:, 0]
    torch.testing.assert_close(shown, images.pixels.tensor[20:60, :, :, 0] / 255, atol=1e-6, rtol=0)


def test_every_purpose_draws_from_a_generator_of_its_own():
    def drawn(*purpose):
        return torch.rand(4, generator=seeded(*purpose)).tolist()

    assert drawn(0, 1, "train-0") == drawn(0, 1, "train-0")
    purposes = [(0, 1, "train-0"), (0, 1, "train-1"), (0, 2, "train-0"), (1, 1, "train-0"), (0, 1, "head")]
    assert len({tuple(drawn(*purpose)) for purpose in purposes}) == len(purposes)
