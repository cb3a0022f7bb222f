"""One process equals several: real processes, gloo, and batches that do not divide evenly among them."""

import json
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from inflora import distributed
from inflora.adapters import Adapter, make_adapter
from inflora.adapters import inflora as adapter_module
from inflora.adapters.covariances import input_covariances
from inflora.adapters.memories import memory_of
from inflora.backbone import build_backbone
from inflora.classifiers import make_classifier
from inflora.config import RunConfig, override
from inflora.continual import run
from inflora.data.loader import Batch, InputFormat, evaluation_batches
from inflora.data.store import open_split
from inflora.data.stream import make_stream
from inflora.draws import Draws
from inflora.metrics import accuracy_matrix
from inflora.model import ContinualModel
from inflora.setup import restore
from inflora.state import RunState, load_state, save_state
from inflora.subspace import Memory, design, update
from inflora.task_data import TaskData
from tests.conftest import pair_of, same_state

pytestmark = pytest.mark.cluster

TASKS, BATCH = 2, 40
RUNS = {
    "inflora": {},
    "every target": {"adapter.targets": ["q", "k", "v", "attn.proj", "mlp.fc1", "mlp.fc2"]},
    "aligned": {"classifier": pair_of("inflora", "aligned")["classifier"]},
    "q, k and v by layers of their own": {
        "backbone.name": "eva02_base_patch14_224",
        "backbone.options.img_size": 32,
        "backbone.options.patch_size": 8,
        "backbone.options.in_chans": 1,
    },
}
WORLDS = pytest.mark.parametrize("world", [2, 3])


def config_of(tiny: RunConfig, kind: str) -> RunConfig:
    return override(tiny, RUNS[kind] | {"optim.batch_size": BATCH})


INPUT = partial(InputFormat, side=32, channels=1, device=torch.device("cpu"))


def first_task(config: RunConfig) -> TaskData:
    """The first task's images as a run reads them."""
    stream = make_stream(config.data, "validation")
    return TaskData(stream.tasks[0], 5, stream.train, INPUT(config.data), config.optim, Draws(config.seed))


def evaluated(config: RunConfig) -> Iterator[Batch]:
    """The first task's evaluation images, in batches that do not divide evenly."""
    stream = make_stream(config.data, "validation")
    return evaluation_batches(stream.evaluate, stream.tasks[0].eval_rows, INPUT(config.data), 7)


def fresh_model(config: RunConfig) -> tuple[ContinualModel, Adapter[Any]]:
    """A prepared model and its adapter, before the first task."""
    model = ContinualModel(build_backbone(config.backbone), make_classifier(config.classifier, 32))
    adapter = make_adapter(config.adapter)
    adapter.prepare(model)
    return model, adapter


def named(prefix: str, batches: list[Batch]) -> dict[str, torch.Tensor]:
    tensors = {f"{prefix}/{i}/images": batch.images for i, batch in enumerate(batches)}
    return tensors | {f"{prefix}/{i}/share": torch.tensor(batch.share) for i, batch in enumerate(batches)}


def covariances_of(config: RunConfig) -> dict[str, torch.Tensor]:
    return input_covariances(fresh_model(config)[0], first_task(config), "before")


@contextmanager
def unlike_the_first(rank: int) -> Iterator[None]:
    """Every process but the first decomposes as another device might: other signs, other numbers of directions."""

    def other_design(*args):
        return [-lora_A[rank:] for lora_A in design(*args)]

    def other_update(*args, **options):
        return [Memory("retain", -memory.basis_DK[:, rank:]) for memory in update(*args, **options)]

    with pytest.MonkeyPatch.context() as patch:
        if rank:
            patch.setattr(adapter_module, "design", other_design)
            patch.setattr(adapter_module, "update", other_update)
        yield


def work(rank: int, world: int, folder: Path, tiny: RunConfig) -> None:
    """What each process does, and leaves in its folder for the tests to look at."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world)
    out = folder / str(rank)
    out.mkdir()
    for kind in RUNS:
        results = list(islice(run(config_of(tiny, kind)), TASKS))
        save_state(results[-1].state, out / kind)
        (out / f"{kind}.json").write_text(json.dumps([result.losses for result in results]))
    with unlike_the_first(rank):
        *_, last = islice(run(config_of(tiny, "inflora")), TASKS)
        save_state(last.state, out / "unlike")
    config = config_of(tiny, "inflora")
    augmented, plain = list(first_task(config).augmented("train-0")), list(evaluated(config))
    save_file(named("train", augmented) | named("plain", plain), out / "batches.safetensors")
    save_file(covariances_of(config), out / "covariances.safetensors")
    total = distributed.all_sum(torch.tensor([1.0, rank]))
    assert total.tolist() == [world, sum(range(world))]
    assert (distributed.world_size(), distributed.rank()) == (world, rank)
    if world > 1:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tiny, digits, tmp_path_factory) -> dict[int, Path]:
    """World size -> the folder with a subfolder for each rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["inflora.continual"])
    folders, started = {}, []
    for world in (1, 2, 3):
        folders[world] = tmp_path_factory.mktemp(f"world{world}")
        started += [context.Process(target=work, args=(rank, world, folders[world], tiny)) for rank in range(world)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0] * len(started)
    return folders


def state_of(processes: dict[int, Path], world: int, rank: int, kind: str) -> RunState:
    return load_state(processes[world] / str(rank) / kind)


def logits_of(state: RunState, config: RunConfig, digits: Path) -> torch.Tensor:
    model, adapter = fresh_model(config)
    restore(model, adapter, state)
    (batch,) = evaluation_batches(open_split(digits, "test"), torch.arange(100), INPUT(config.data), 100)
    with torch.no_grad():
        return model(batch.images)


def batches_of(processes: dict[int, Path], world: int, kind: str) -> list[list[tuple[torch.Tensor, float]]]:
    """Per rank: (images, share) of every batch."""
    files = [load_file(processes[world] / str(rank) / "batches.safetensors") for rank in range(world)]
    count = sum(name.startswith(kind) and name.endswith("share") for name in files[0])
    return [[(f[f"{kind}/{i}/images"], float(f[f"{kind}/{i}/share"])) for i in range(count)] for f in files]


def test_the_last_batch_leaves_one_of_three_workers_without_images(processes):
    assert [len(images) for images, _ in (batches[-1] for batches in batches_of(processes, 3, "train"))].count(0) >= 1


@WORLDS
def test_the_workers_batches_together_are_those_of_one_process(world, processes):
    (whole,), shared = batches_of(processes, 1, "train"), batches_of(processes, world, "train")
    for index, (images, _) in enumerate(whole):
        for rank, batches in enumerate(shared):
            assert torch.equal(batches[index][0], images[rank::world])
        assert sum(batches[index][1] for batches in shared) == pytest.approx(1)


@WORLDS
def test_every_image_is_evaluated_by_exactly_one_worker(world, processes):
    (whole,) = (torch.cat([images for images, _ in batches]) for batches in batches_of(processes, 1, "plain"))
    shares = [torch.cat([images for images, _ in batches]) for batches in batches_of(processes, world, "plain")]
    assert all(torch.equal(share, whole[rank::world]) for rank, share in enumerate(shares))


@WORLDS
def test_covariances_are_those_of_one_process(world, processes):
    (whole,), shared = (
        [load_file(processes[n] / str(rank) / "covariances.safetensors") for rank in range(n)] for n in (1, world)
    )
    for covariances in shared:
        torch.testing.assert_close(covariances, whole, rtol=1e-5, atol=1e-7)


@WORLDS
@pytest.mark.parametrize("kind", RUNS)
def test_the_memory_and_the_class_statistics_are_those_of_one_process(world, kind, processes):
    whole, ours = (state_of(processes, n, 0, kind) for n in (1, world))
    assert ours.adapter.keys() == whole.adapter.keys()
    for name, memory in memory_of(whole.adapter).items():
        torch.testing.assert_close(projector(memory_of(ours.adapter)[name]), projector(memory), atol=1e-4, rtol=0)
    assert ours.classifier.keys() == whole.classifier.keys()
    statistics = [name for name in whole.classifier if name.startswith(("means/", "factors/"))]
    assert bool(statistics) == (kind == "aligned")
    for name in statistics:
        torch.testing.assert_close(ours.classifier[name], whole.classifier[name], atol=1e-4, rtol=1e-3)


def projector(memory: Memory) -> torch.Tensor:
    return memory.basis_DK @ memory.basis_DK.T


@WORLDS
@pytest.mark.parametrize("kind", RUNS)
def test_all_workers_hold_the_same_model_and_memory(world, kind, processes):
    first, *others = (state_of(processes, world, rank, kind) for rank in range(world))
    assert all(same_state(first, other) for other in others)


@WORLDS
def test_workers_that_would_decompose_differently_still_hold_the_first_ones_adapters_and_memory(world, processes):
    expected = state_of(processes, world, 0, "inflora")
    assert all(same_state(expected, state_of(processes, world, rank, "unlike")) for rank in range(world))


@WORLDS
@pytest.mark.parametrize("kind", RUNS)
def test_losses_accuracies_and_logits_are_those_of_one_process(world, kind, processes, tiny, digits):
    whole, shared = state_of(processes, 1, 0, kind), state_of(processes, world, 0, kind)
    losses = [json.loads((processes[n] / "0" / f"{kind}.json").read_text()) for n in (1, world)]
    torch.testing.assert_close(*map(torch.tensor, losses), atol=1e-5, rtol=0)
    assert accuracy_matrix(shared.evaluations) == accuracy_matrix(whole.evaluations)
    logits = [logits_of(state, config_of(tiny, kind), digits) for state in (shared, whole)]
    torch.testing.assert_close(*logits, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("backend", "device"), [("gloo", "cpu"), ("nccl", "cuda")])
def test_a_workers_yes_or_no_travels_on_a_device_that_the_backend_knows(backend, device, monkeypatch):
    sent = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(torch, "tensor", lambda value, device: sent.append((value, device)) or torch.full((), value))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(1))
    assert distributed.all_true(True) and not distributed.all_true(False)
    assert sent == [(1, device), (0, device)]


def test_without_a_process_group_nothing_is_exchanged():
    assert (distributed.world_size(), distributed.rank()) == (1, 0)
    assert distributed.all_true(True) and not distributed.all_true(False)
    tensor, parameter = torch.ones(2), torch.nn.Parameter(torch.ones(2))
    assert distributed.all_sum(tensor) is tensor
    assert distributed.broadcast(tensor) is tensor
    distributed.sum_gradients([parameter])
    assert parameter.grad is None
