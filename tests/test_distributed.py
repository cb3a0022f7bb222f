"""One process equals several: real processes, gloo, and batches that do not divide evenly among them."""

import json
import multiprocessing
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from inflora import distributed
from inflora.backbone import build_backbone
from inflora.config import RunConfig, override
from inflora.continual import run
from inflora.data.loader import Batch, Input, evaluation_batches, seeded, training_batches
from inflora.data.store import open_split
from inflora.data.stream import make_stream
from inflora.methods import TaskData, make_method
from inflora.methods.statistics import input_covariances
from inflora.metrics import accuracy_matrix
from inflora.model import ContinualModel
from inflora.state import RunState, load_state, save_state

TASKS, BATCH = 2, 40
METHODS = ("inflora", "frozen")
WORLDS = pytest.mark.parametrize("world", [2, 3])


def config_of(tiny: RunConfig, method: str) -> RunConfig:
    return override(tiny, {"method": {"name": method}, "optim.batch_size": BATCH})


def passes_of(config: RunConfig, device: torch.device):
    """The passes over the first task's images as a run makes them."""
    stream = make_stream(config.data, "validation")
    input = Input(config.data, 32, 1, device)
    rows = stream.tasks[0].train_rows

    def passes(purpose: str):
        generator = seeded(0, 0, purpose)
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        return training_batches(stream.train, shuffled, input, BATCH, generator)

    return stream, passes, evaluation_batches(stream.evaluate, stream.tasks[0].eval_rows, input, 7)


def named(prefix: str, batches: list[Batch]) -> dict[str, torch.Tensor]:
    tensors = {f"{prefix}/{i}/images": batch.images for i, batch in enumerate(batches)}
    return tensors | {f"{prefix}/{i}/share": torch.tensor(batch.share) for i, batch in enumerate(batches)}


def covariances_of(config: RunConfig) -> dict[str, torch.Tensor]:
    stream, passes, _ = passes_of(config, torch.device("cpu"))
    model, method = ContinualModel(build_backbone(config.backbone), 32), make_method(config.method)
    method.prepare(model)
    return input_covariances(model, TaskData(stream.tasks[0], 5, 0, passes, lambda: passes("")), "before")


def work(rank: int, world: int, folder: Path, tiny: RunConfig) -> None:
    """What each process does, and leaves in its folder for the tests to look at."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world)
    out = folder / str(rank)
    out.mkdir()
    for method in METHODS:
        results = list(islice(run(config_of(tiny, method)), TASKS))
        save_state(results[-1].state, out / method)
        (out / f"{method}.json").write_text(json.dumps([result.losses for result in results]))
    config = config_of(tiny, "inflora")
    _, passes, plain = passes_of(config, torch.device("cpu"))
    save_file(named("train", list(passes("train-0"))) | named("plain", list(plain)), out / "batches.safetensors")
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


def state_of(processes: dict[int, Path], world: int, rank: int, method: str) -> RunState:
    return load_state(processes[world] / str(rank) / method)


def logits_of(state: RunState, tiny: RunConfig, digits: Path) -> torch.Tensor:
    model = ContinualModel(build_backbone(tiny.backbone), 32)
    make_method(tiny.method).prepare(model)
    model.load_learnt_state(state.model)
    images, input = open_split(digits, "test"), Input(tiny.data, 32, 1, torch.device("cpu"))
    (batch,) = evaluation_batches(images, torch.arange(100), input, 100)
    with torch.no_grad():
        return model.logits(model.features(batch.images))


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
def test_the_memory_is_that_of_one_process(world, processes):
    whole, shared = (state_of(processes, n, 0, "inflora").method for n in (1, world))
    assert shared.keys() == whole.keys()
    for name, basis_DK in whole.items():
        ours = shared[name]
        torch.testing.assert_close(ours @ ours.T, basis_DK @ basis_DK.T, atol=1e-4, rtol=0)


@WORLDS
@pytest.mark.parametrize("method", METHODS)
def test_all_workers_hold_the_same_model(world, method, processes):
    first, *others = (state_of(processes, world, rank, method) for rank in range(world))
    for other in others:
        assert other.evaluations == first.evaluations
        assert all(torch.equal(first.model[name], other.model[name]) for name in first.model)


@WORLDS
@pytest.mark.parametrize("method", METHODS)
def test_losses_accuracies_and_logits_are_those_of_one_process(world, method, processes, tiny, digits):
    whole, shared = state_of(processes, 1, 0, method), state_of(processes, world, 0, method)
    losses = [json.loads((processes[n] / "0" / f"{method}.json").read_text()) for n in (1, world)]
    torch.testing.assert_close(*map(torch.tensor, losses), atol=1e-5, rtol=0)
    assert accuracy_matrix(shared.evaluations) == accuracy_matrix(whole.evaluations)
    torch.testing.assert_close(logits_of(shared, tiny, digits), logits_of(whole, tiny, digits), atol=1e-3, rtol=0)


def test_without_a_process_group_nothing_is_exchanged():
    assert (distributed.world_size(), distributed.rank()) == (1, 0)
    tensor, parameter = torch.ones(2), torch.nn.Parameter(torch.ones(2))
    assert distributed.all_sum(tensor) is tensor
    distributed.sum_gradients([parameter])
    assert parameter.grad is None
