"""Whole runs on a GPU, simulated (``tests/simulated_gpu.py``): every tensor on its device, and nobody waits.

What no machine without a GPU could see before: which device tensors are on, what crosses from the host, and where the
host waits. Each kind of mistake is planted at the end, and found.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from inflora import backbone, covariance, setup, training
from inflora.adapters import inflora as inflora_adapter
from inflora.classifiers import make_classifier
from inflora.config import CLASSIFIERS, METHODS, LinearSettings, RunConfig, override
from inflora.continual import TaskResult, run
from inflora.cuda import pick_device
from inflora.data import DATASETS, augment, loader, pixels, prepare_store, staging
from inflora.data.source import Arrays, Dataset, Options, Source
from inflora.data.stream import make_stream
from inflora.draws import Draws
from inflora.drift import Probes
from inflora.model import ContinualModel
from inflora.runs import train_into
from inflora.serving import load, predict
from inflora.state import load_state, save_state
from inflora.task_data import TaskData
from tests.conftest import pair_of, same_state, tiny_method
from tests.simulated_gpu import DEVICE, Count, DeviceError, DeviceTensor, Gpu, nccl, simulated_gpu

CLASSES, PER_CLASS, TASKS = 6, 12, 3
ALIGNED = pair_of("inflora", "aligned")
FORMS = ("raw", "encoded", "decoded", *(f"{form}, too large to stay" for form in ("raw", "encoded", "decoded")))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Stores of every form: noise that is redder, greener or bluer, darker or brighter."""
    folder, random = tmp_path_factory.mktemp("stores"), np.random.default_rng(0)

    def image(label: int, height: int, width: int) -> np.ndarray:
        noise = random.integers(0, 100, (height, width, 3))
        return (noise + (60 + 80 * (label // 3)) * (np.arange(3) == label % 3)).astype(np.uint8)

    for split, count in (("train", PER_CLASS), ("test", 4)):
        for label in range(CLASSES):
            (folder / "source" / split / f"class{label}").mkdir(parents=True)
            for index in range(count):
                path = folder / "source" / split / f"class{label}" / f"{index}.png"
                Image.fromarray(image(label, *random.integers(20, 40, 2))).save(path)
    for name, side in (("encoded", None), ("decoded", 24)):
        prepare_store(name, DATASETS["image_folder"], folder / "source", Options(), str(folder), shorter_side=side)
    labels = np.repeat(np.arange(CLASSES), PER_CLASS)
    arrays = Arrays(np.stack([image(label, 16, 16) for label in labels]), labels)
    names = tuple(f"class{label}" for label in range(CLASSES))
    source = Source("made up", names, {"train": arrays, "test": arrays})
    prepare_store("raw", Dataset(lambda *_: source, needs=None), folder, Options(), str(folder))
    return folder


def config_of(tiny: RunConfig, root: Path, form: str = "raw", **changes) -> RunConfig:
    """The tiny run on a store of this form, on the device."""
    data = {"data.dataset": form.split(",")[0], "data.root": root, "data.tasks": TASKS, "data.validation": 0.25}
    colours = {"backbone.options": tiny.backbone.options | {"in_chans": 3}}
    rest = {"device": "cuda", "optim.batch_size": 10, "precision": "fp32"}
    return override(tiny, data | colours | rest | changes)


@contextmanager
def gpu_for(form: str = "raw") -> Iterator[Gpu]:
    """A device with room for everything, or for no store."""
    with simulated_gpu(memory_bytes=1024 if "too large" in form else 80 * 2**30) as gpu:
        yield gpu


def learnt(config: RunConfig, tasks: int = 2) -> list[TaskResult]:
    return list(islice(run(config), tasks))


# The same numbers as on the CPU, with every tensor where it belongs.


KINDS = [("inflora", form, precision) for form in FORMS for precision in ("fp32", "bf16")]
KINDS += [
    (method, *kind)
    for method in METHODS
    for kind in (("raw", "fp32"), ("encoded, too large to stay", "bf16"))
    if method != "inflora"
]


@pytest.mark.parametrize(("method", "form", "precision"), KINDS)
def test_a_run_on_the_device_learns_what_a_run_on_the_cpu_learns(method, form, precision, tiny, root):
    config = config_of(tiny, root, form, precision=precision, **tiny_method(method))
    with gpu_for(form):
        on_device = learnt(config)
    on_cpu = learnt(override(config, {"device": "cpu"}))
    for ours, theirs in zip(on_device, on_cpu, strict=True):
        torch.testing.assert_close(ours.losses, theirs.losses, rtol=2e-3, atol=1e-3)
        torch.testing.assert_close(ours.accuracies, theirs.accuracies, rtol=0, atol=0.13)  # one of eight images


@pytest.mark.parametrize("classifier", [name for name in CLASSIFIERS if "drift" in CLASSIFIERS[name].model_fields])
def test_classes_follow_the_features_on_the_device_as_on_the_cpu(classifier, tiny, root):
    changes = pair_of("lora", classifier) | {"classifier.drift": 0.1, "classifier.views": 1, "adapter.features": "both"}
    config = config_of(tiny, root, **changes)
    with gpu_for():
        ours = learnt(config)[-1].state
    theirs = learnt(override(config, {"device": "cpu"}))[-1].state
    assert ours.evaluations == theirs.evaluations
    torch.testing.assert_close(ours.classifier, theirs.classifier, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("form", FORMS)
def test_images_and_labels_of_a_batch_are_on_the_device_and_those_of_the_cpu(form, tiny, root):
    config = config_of(tiny, root, form)
    with gpu_for(form):
        ours = batches_of(config, DEVICE)
        assert all(isinstance(part, DeviceTensor) for batch in ours for part in (batch.images, batch.labels))
        images, labels = (torch.cat([getattr(batch, part).cpu() for batch in ours]) for part in ("images", "labels"))
    theirs = batches_of(config, torch.device("cpu"))
    # Files that stay on the device are resized without Pillow's roundings on the way.
    atol = 1.5 / 255 if form in ("encoded", "decoded") else 1e-5
    torch.testing.assert_close(images, torch.cat([batch.images for batch in theirs]), atol=atol, rtol=0)
    assert torch.equal(labels, torch.cat([batch.labels for batch in theirs]))


def batches_of(config: RunConfig, device: torch.device) -> list[loader.Batch]:
    """An augmented pass over the first task."""
    stream = make_stream(config.data, "validation").resident_on(device)
    input_format = loader.InputFormat(config.data, 32, 3, device)
    return list(loader.training_batches(stream.train, stream.tasks[0].train_rows, input_format, 10, torch.Generator()))


# What is kept, and used again.


def test_a_run_that_is_stopped_and_restored_on_the_device_ends_as_one_that_is_not(tiny, root, tmp_path):
    config = config_of(tiny, root)
    with gpu_for():
        whole = learnt(config, 3)
        save_state(whole[0].state, tmp_path)
        resumed = list(islice(run(config, load_state(tmp_path)), 2))
    assert same_state(resumed[-1].state, whole[-1].state)


def test_a_state_holds_tensors_of_the_host_only(tiny, root):
    with gpu_for():
        state = learnt(config_of(tiny, root, **ALIGNED))[-1].state
    for part in state.tensors.values():
        assert part and not any(isinstance(tensor, DeviceTensor) for tensor in part.values())


@pytest.mark.parametrize("adapter", ["inflora", "dualprompt"])
def test_predictions_on_the_device_are_those_of_the_cpu(adapter, tiny, root, tmp_path):
    config = override(config_of(tiny, root, "encoded", **pair_of(adapter)), {"device": "cpu"})
    train_into(tmp_path / "run", config, "validation")
    files = sorted((root / "source" / "test").rglob("*.png"))[:5]
    expected = list(predict(load(tmp_path / "run"), files))
    with gpu_for():
        said = list(predict(load(tmp_path / "run"), files))
    assert [one.file for one in said] == files
    assert [one.classes[0][0] for one in said] == [one.classes[0][0] for one in expected]


# Nobody waits: what crosses from the host, and when it asks for a value.


def counted(gpu: Gpu, patch: pytest.MonkeyPatch) -> list[Count]:
    """Will hold what each epoch has asked of the device, from its first batch to its last loss."""
    counts: list[Count] = []
    real = training.train_epoch

    def train_epoch(*args) -> tuple[list[float], float]:
        before = replace(gpu.count)
        losses = real(*args)
        counts.append(gpu.count - before)
        return losses

    patch.setattr(training, "train_epoch", train_epoch)
    return counts


def counts_of(config: RunConfig, form: str = "raw", tasks: int = 1) -> list[Count]:
    with gpu_for(form) as gpu, pytest.MonkeyPatch.context() as patch:
        counts = counted(gpu, patch)
        learnt(config, tasks)
    return counts


def assert_free_of_waiting(counts: list[Count]) -> None:
    assert counts
    for count in counts:
        assert count.synchronisations == 1  # for the losses of all its steps
        assert count.pageable_copies == 0


@pytest.mark.parametrize("form", FORMS)
def test_an_epoch_waits_for_the_device_once_and_copies_from_pinned_memory_only(form, tiny, root):
    config = config_of(tiny, root, form, **{"optim.epochs": 2, "data.mean": (0.5, 0.5, 0.5)})
    assert_free_of_waiting(counts_of(config, form))


@pytest.mark.parametrize("method", METHODS)
def test_no_step_waits_for_the_device_whatever_the_method(method, tiny, root):
    counts = counts_of(config_of(tiny, root, **tiny_method(method)), tasks=2)
    if method in ("ncm", "slda"):  # train nothing: no epochs
        assert not counts
    else:
        assert_free_of_waiting(counts)


@pytest.mark.parametrize("form", ["raw", "encoded", "decoded"])
def test_a_store_that_stays_on_the_device_needs_no_copy_per_batch(form, tiny, root):
    few, many = (counts_of(config_of(tiny, root, form, **{"optim.batch_size": size}))[0] for size in (100, 2))
    assert many.kernels > 4 * few.kernels
    assert many.pinned_copies == few.pinned_copies == 4  # which images, their boxes, whether mirrored, labels


def test_what_the_device_makes_of_arrived_images_is_no_waiting(tiny, root, monkeypatch):
    form = "raw, too large to stay"
    with gpu_for(form) as gpu:
        kernels: list[int] = []
        record = torch.cuda.Event.record

        def watched(event, stream) -> None:
            if event.timed:
                kernels.append(gpu.count.kernels)
            record(event, stream)

        monkeypatch.setattr(torch.cuda.Event, "record", watched)
        batches = batches_of(config_of(tiny, root, form), DEVICE)
    assert len(kernels) == 2 * len(batches)
    assert kernels[::2] == kernels[1::2]


def test_evaluation_waits_for_the_device_no_more_often_for_many_images_than_for_few(tiny, root, monkeypatch):
    counts = []
    for size in (1000, 2):
        monkeypatch.setattr(training, "_EVALUATION_BATCH", size)
        with gpu_for() as gpu:
            config = config_of(tiny, root)
            stream = make_stream(config.data, "validation").resident_on(DEVICE)
            model = ContinualModel(backbone.build_backbone(config.backbone), make_classifier(LinearSettings(), 32))
            model.settle_on(DEVICE)
            first, input_format = stream.tasks[0], loader.InputFormat(config.data, 32, 3, DEVICE)
            model.classifier.begin_task(TaskData(first, 1, stream.train, input_format, config.optim, Draws(0)))
            watched = Probes([first], 32, DEVICE)
            before = replace(gpu.count)
            training.evaluate(model, stream, [first], input_format, watched.see)
            counts.append(gpu.count - before)
    few, many = counts
    assert many.kernels > 2 * few.kernels
    assert many.synchronisations == few.synchronisations


def test_more_epochs_of_alignment_ask_and_copy_no_more_than_one(tiny, root):
    def count_of(epochs: int) -> Count:
        with gpu_for() as gpu:
            learnt(config_of(tiny, root, **ALIGNED, **{"classifier.epochs": epochs}))
        return gpu.count

    one, four = count_of(1), count_of(4)
    assert four.kernels > one.kernels
    assert replace(four, kernels=0) == replace(one, kernels=0)


# Several workers, with a process group that knows tensors of GPUs only.


def work(rank: int, folder: Path, config: RunConfig) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    with gpu_for(), nccl():
        for kind, changes in (("inflora", {}), ("aligned", ALIGNED)):
            save_state(learnt(override(config, changes))[-1].state, folder / f"{kind}{rank}")
    dist.destroy_process_group()


@pytest.mark.cluster
def test_two_workers_exchange_tensors_of_the_device_only_and_agree(tiny, root, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["inflora.continual"])
    processes = [context.Process(target=work, args=(rank, tmp_path, config_of(tiny, root))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    for kind in ("inflora", "aligned"):
        assert same_state(*(load_state(tmp_path / f"{kind}{rank}") for rank in range(2)))


# Planted mistakes: kinds that fail on a GPU, or are slow there. Each is found.

Plant = Callable[[pytest.MonkeyPatch], None]


def in_the_place_of(owner: object, name: str, other: object) -> Plant:
    return lambda patch: patch.setattr(owner, name, other)


def beside_every_step(do: Callable[[loader.Batch], object]) -> Plant:
    real = training.train_step
    return in_the_place_of(training, "train_step", lambda *args: (do(args[-1]), real(*args))[1])


def covariance_on_the_host(sums: covariance.InputCovariance, width: int, device: torch.device) -> None:
    sums.sum_DD = torch.zeros(width, width, dtype=torch.float64)
    sums.count = torch.zeros((), dtype=torch.float64)


def written_to_after_the_copy(pixels: Tensor, device: torch.device, real=staging.copy_ahead) -> Callable[[], Tensor]:
    arrive = real(pixels, device)
    pixels.add_(1)
    return arrive


def noisy(images: Tensor, crops: augment.Crops, side: int, real=pixels.crop_and_resize) -> Tensor:
    return real(images, crops, side) + torch.randn(1, generator=torch.Generator(), device=images.device)


def pageable(shape: Sequence[int], device: torch.device) -> Tensor:
    return torch.empty(tuple(shape), dtype=torch.uint8)


LARGE = "encoded, too large to stay"
MISTAKES: dict[str, tuple[str, Plant]] = {
    "a device without its index": ("raw", in_the_place_of(setup, "pick_device", lambda _: torch.device("cuda"))),
    "labels left on the host": ("raw", in_the_place_of(loader, "to_device", lambda tensor, device: tensor)),
    "a model left on the host": ("raw", in_the_place_of(ContinualModel, "to", lambda model, *_: model)),
    "a classifier made on the host": (
        "raw",
        in_the_place_of(torch.nn.Linear, "to", lambda head, *_: head),
    ),
    "a covariance summed on the host": (
        "raw",
        in_the_place_of(covariance.InputCovariance, "__init__", covariance_on_the_host),
    ),
    "a memory kept on another device": (
        "raw",
        in_the_place_of(
            inflora_adapter, "energy_inside", lambda covariance, *_: float((covariance @ torch.eye(32))[0, 0])
        ),
    ),
    "a value read in every step": ("raw", beside_every_step(lambda batch: batch.labels.sum().item())),
    "a list of values in every step": ("raw", beside_every_step(lambda batch: batch.labels.tolist())),
    "a branch on a value in every step": ("raw", beside_every_step(lambda batch: bool(batch.labels.sum() > 0))),
    "an index of truth values in every step": ("raw", beside_every_step(lambda batch: batch.labels[batch.labels > 0])),
    "a copy to the host in every step": ("raw", beside_every_step(lambda batch: batch.labels.cpu())),
    "a number copied in every step": ("raw", beside_every_step(lambda batch: torch.tensor(0.5, device=DEVICE))),
    "a time asked for before it is known": (LARGE, beside_every_step(lambda batch: batch.waited())),
    "a wait for the device in every step": ("raw", beside_every_step(lambda batch: torch.cuda.synchronize())),
    "numbers drawn by a generator of the host": ("raw", in_the_place_of(pixels, "crop_and_resize", noisy)),
    "a tensor of the host summed over workers": (
        "raw",
        beside_every_step(lambda batch: dist.all_reduce(torch.zeros(1))),
    ),
    "memory that is not pinned": (LARGE, in_the_place_of(pixels, "host_memory", pageable)),
    "a copy that is not waited for": (
        LARGE,
        lambda patch: patch.setattr(torch.cuda.Stream, "wait_event", lambda stream, event: None),
    ),
    "a copy whose memory is given away": (LARGE, in_the_place_of(DeviceTensor, "record_stream", lambda *_: None)),
    "pinned memory written to too soon": (LARGE, in_the_place_of(staging, "copy_ahead", written_to_after_the_copy)),
}


def run_without_waiting(config: RunConfig, form: str, plant: Plant = lambda patch: None) -> None:
    """A run with a mistake in it; raises AssertionError where it waits or copies."""
    with pytest.MonkeyPatch.context() as patch, gpu_for(form) as gpu, nccl():
        plant(patch)
        counts = counted(gpu, patch)
        learnt(config, tasks=1)
    assert_free_of_waiting(counts)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(mistake, tiny, root):
    form, plant = MISTAKES[mistake]
    with pytest.raises((DeviceError, AssertionError)):
        run_without_waiting(config_of(tiny, root, form), form, plant)


@pytest.mark.parametrize("form", ["raw", LARGE])
def test_nothing_is_found_where_nothing_is_planted(form, tiny, root):
    run_without_waiting(config_of(tiny, root, form), form)


def test_the_device_that_is_picked_has_its_index():
    with simulated_gpu():
        assert pick_device("auto") == pick_device("cuda") == torch.zeros(1, device=DEVICE).device
    assert pick_device("cpu") == torch.zeros(1).device
