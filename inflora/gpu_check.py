"""Does this GPU do what a run asks of it? Checks of the whole path, a few seconds each.

On the CPU the same checks run on a smaller transformer: a rehearsal, whose figures mean nothing.
"""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from itertools import islice
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from inflora import distributed
from inflora.config import BackboneSettings, DataSettings, OptimSettings, RunConfig, override
from inflora.continual import TaskResult, run
from inflora.cuda import require_cuda, versions
from inflora.data import DATASETS, ensure_store, prepare_store
from inflora.data.samples import SAMPLES
from inflora.data.source import Options
from inflora.data.store import open_split, read_manifest
from inflora.data.stream import make_stream
from inflora.isolated import Bench, Check, Failed, NotTried, called, preload
from inflora.predictions import Prediction
from inflora.runs import train_into
from inflora.serving import load, predict
from inflora.state import RunState, load_state, save_state

TOLERANCE = 5e-5
"""The most by which losses, and features in relation to their size, may differ on two ways to the same float32 numbers.

Rounding as other kernels do it, 2^-23 a product, moves ``exact_run`` by 4e-7 at most; products as coarse as TF32's
(2^-11) move its losses by 5e-5 and its features by 8e-4, bfloat16's by 7e-4 and 5e-3. It holds for SGD: Adam makes
whole steps of the signs of vanishing gradients.
"""

_SMALL_VIT = BackboneSettings(
    name="vit_tiny_patch16_224",
    pretrained=False,
    options={"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
)
_ALIGNED = {"classifier": {"name": "aligned", "epochs": 2, "temperature": 0.1}}
_WORKERS_PATIENCE_S = 60


def whats_there(bench: Bench) -> str:
    """Multiplies, too: a PyTorch without kernels for this card fails here."""
    if bench.device == "cpu":
        return f"a rehearsal on the CPU; {versions()}"
    require_cuda()
    card, free = torch.cuda.get_device_properties(0), torch.cuda.mem_get_info()[0]
    ones_SS = torch.ones(64, 64, device="cuda:0")
    if not (ones_SS @ ones_SS == 64).all():
        raise Failed(f"{card.name} multiplies matrices of ones wrongly")
    bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
    memory = f"{free / 2**30:.1f} of {card.total_memory / 2**30:.1f} GB free"
    return f"{card.name}, {memory}, compute capability {card.major}.{card.minor}, {bf16}; {versions()}"


# Learning.


def learn_digits(bench: Bench) -> str:
    """The shipped backbone, in the precision that runs have."""
    return learnt(first_tasks(digits_run(bench)), at_least=0.6)


def learn_aligned(bench: Bench) -> str:
    """Classifiers that learn on features drawn from their classes' Gaussians."""
    return learnt(first_tasks(override(digits_run(bench), _ALIGNED)), at_least=0.6)


def learn_raw_store(bench: Bench) -> str:
    """100 classes of 32 x 32 pixels, from an archive of CIFAR-100's own form."""
    config = _generated(bench, "cifar100", classes=100, per_class=8, tasks=10)
    return learnt(first_tasks(config), at_least=0.25, metric="acc/task_aware")


def learn_encoded_store(bench: Bench) -> str:
    """JPEGs of different sizes, decoded as they are needed."""
    config = _generated(bench, "imagenet_r", classes=8, per_class=12, tasks=2)
    return learnt(first_tasks(config), at_least=0.6, metric="acc/task_aware")


def learn_vit(bench: Bench) -> str:
    """The backbone of the paper's experiments in batches of 128, in bfloat16 where the device has it."""
    real = bench.device == "cuda"
    config = _generated(bench, "cifar100", classes=10, per_class=160 if real else 8, tasks=1)
    if real:
        backbone = BackboneSettings(name="vit_base_patch16_224", pretrained=False)
        config = override(config, {"backbone": backbone.model_dump(), "optim.batch_size": 128, "optim.lr": 5e-4})
    ends_s: list[float] = []
    precision = "auto" if real else "bf16"
    (result,) = run(override(config, {"precision": precision}), on_epoch=lambda _: ends_s.append(time.perf_counter()))
    said = learnt([result], at_least=0.5)
    images = len(make_stream(config.data, "validation").tasks[0].train_rows)
    # The first epoch has yet to choose its kernels.
    rate = images * (len(ends_s) - 1) / (ends_s[-1] - ends_s[0])
    peak = f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GB" if real else "of a tiny transformer"
    return f"{result.model.precision}, {rate:,.0f} images/s, {peak}, {said}"


def digits_run(bench: Bench) -> RunConfig:
    """Tasks of two digits, an epoch each."""
    data = DataSettings(dataset="digits", root=str(bench.stores), tasks=5, order_seed=1993)
    optim = OptimSettings(epochs=1, batch_size=16, head_init="zero")
    return RunConfig(data=data, optim=optim, device=bench.device)


def _generated(bench: Bench, dataset: str, classes: int, per_class: int, tasks: int) -> RunConfig:
    """A run on generated images that come as their dataset's authors give theirs away; its backbone has learnt nothing.

    Features that know nothing confuse the tasks: such a run is judged with the task known.
    """
    source = SAMPLES[dataset](bench.folder, classes, per_class)
    prepare_store(dataset, DATASETS[dataset], source, Options(), str(bench.folder), subset=True)
    data = DataSettings(dataset=dataset, root=str(bench.folder), tasks=tasks, order_seed=1993, validation=0.25)
    optim = OptimSettings(epochs=4, batch_size=8, lr=5e-3, head_init="zero")
    return RunConfig(data=data, backbone=_SMALL_VIT, optim=optim, device=bench.device)


def first_tasks(config: RunConfig, state: RunState | None = None) -> list[TaskResult]:
    """Learn two tasks, or the second: the first that has something to remember."""
    return list(islice(run(config, state), 2 - (state.tasks_done if state else 0)))


def learnt(results: Sequence[TaskResult], at_least: float, metric: str = "acc/seen") -> str:
    """Raise Failed unless every task's loss fell and the accuracy after the last is ``at_least`` that."""
    for result in results:
        first, last = result.step_losses[0][0], result.losses[-1]
        if not last < first < math.inf:
            raise Failed(f"the loss of task {result.task + 1} went from {first:.3f} to {last:.3f}")
    accuracy = results[-1].metrics[metric]
    if not accuracy >= at_least:
        raise Failed(f"{metric} is {100 * accuracy:.1f} %, not at least {100 * at_least:.0f} %")
    return f"{metric} {100 * accuracy:.1f} %, {fmean(result.seconds for result in results):.1f} s a task"


# Two ways to the same numbers.


class Course(NamedTuple):
    """Numbers of a run: every step's loss, some features of every task's images, every task's row of accuracies."""

    losses: np.ndarray
    features: dict[str, np.ndarray]
    accuracies: list[float]


def course(results: Sequence[TaskResult]) -> Course:
    """The course of some tasks."""
    losses = [loss for result in results for epoch in result.step_losses for loss in epoch]
    features = {task: features.cpu().numpy() for task, features in results[-1].state.probes.items()}
    return Course(np.array(losses), features, [accuracy for result in results for accuracy in result.accuracies])


def same(ours: Course, theirs: Course) -> str:
    """Raise Failed unless two runs went the same way, but for rounding."""
    loss = float(np.abs(ours.losses - theirs.losses).max())
    pairs = [(ours.features[task], theirs.features[task]) for task in theirs.features]
    feature = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)
    accuracy = float(np.abs(np.subtract(ours.accuracies, theirs.accuracies)).max())
    said = f"losses differ by {loss:.0e}, features by {feature:.0e}"
    # An image that is as near to one class as to another may fall on either side.
    if not (loss <= TOLERANCE and feature <= TOLERANCE and accuracy <= 0.05):
        raise Failed(f"{said}, accuracies by {100 * accuracy:.0f} %; rounding explains {TOLERANCE:g}")
    return said


def as_on_the_cpu(bench: Bench) -> str:
    """Finds arithmetic that is silently wrong: images of another batch, another precision than was asked for."""
    config = exact_run(bench)
    return same(course(first_tasks(config)), course(first_tasks(override(config, {"device": "cpu"}))))


def exact_run(bench: Bench) -> RunConfig:
    """Two tasks of a few steps in float32; how products are rounded moves their numbers by little more than itself."""
    small = BackboneSettings(pretrained=False, options={"embed_dim": 32, "depth": 2, "num_heads": 2})
    backbone = BackboneSettings() if bench.device == "cuda" else small
    optim = {"optim.name": "sgd", "optim.lr": 0.02, "optim.batch_size": 64}
    exact = {"backbone": backbone.model_dump(), "precision": "fp32", "adapter.rank": 4}
    return override(digits_run(bench), optim | exact)


def resume(bench: Bench) -> str:
    """Stopped after its first task, saved, restored: the run ends as one that was not."""
    config = override(exact_run(bench), _ALIGNED)
    first, second = first_tasks(config)
    save_state(first.state, bench.folder / "state")
    return same(course(first_tasks(config, load_state(bench.folder / "state"))), course([second]))


def two_workers(bench: Bench) -> str:
    """Two processes with a GPU each (on the CPU: two processes): one reduction, and the numbers of one process."""
    backend = "nccl" if bench.device == "cuda" else "gloo"
    if bench.device == "cuda" and torch.cuda.device_count() < 2:
        raise NotTried(f"{torch.cuda.device_count()} GPU: nothing to reduce over")
    ensure_store("digits", str(bench.stores))
    preload([__name__])
    with ExitStack() as stack:
        outputs = [bench.folder / f"worker-{rank}" for rank in range(2)]
        workers = [
            stack.enter_context(called(_worker, bench, backend, rank, output=output))
            for rank, output in enumerate(outputs)
        ]
        try:
            ours, _ = [answer(_WORKERS_PATIENCE_S) for answer in workers]
        finally:
            print(*(output.read_text(errors="replace") for output in outputs), sep="\n")
    return f"{backend}: {same(ours, course(first_tasks(exact_run(bench))))}"


def _worker(bench: Bench, backend: str, rank: int) -> Course:
    device = torch.device("cpu")
    if bench.device == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    meeting, patience = f"file://{bench.folder / 'meeting'}", timedelta(seconds=_WORKERS_PATIENCE_S)
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=2, timeout=patience)
    total = float(distributed.all_sum(torch.tensor(1.0 + rank, device=device)))
    if total != 3:
        raise Failed(f"{backend} sums 1 and 2 to {total:g}")
    ours = course(first_tasks(exact_run(bench)))
    dist.destroy_process_group()
    return ours


# Using a model.


def answer_images(bench: Bench) -> str:
    """Train, then ask about files as ``inflora predict`` does."""
    config = override(digits_run(bench), {"data.tasks": 2})
    train_into(bench.folder / "run", config, "test")
    folder = ensure_store("digits", str(bench.stores))
    names, images = read_manifest(folder).classes, open_split(folder, "test")
    shown = {bench.folder / f"{row}.png": names[label] for row, label in enumerate(images.labels[:50].tolist())}
    for row, file in enumerate(shown):
        Image.fromarray(images.pixels.array(row).squeeze(2)).save(file)
    ours, theirs = (
        list(predict(load(bench.folder / "run"), list(shown), top=len(names), device=device))
        for device in (bench.device, "cpu")
    )
    return agree(ours, theirs, list(shown.values()))


def agree(ours: Sequence[Prediction], theirs: Sequence[Prediction], right: Sequence[str]) -> str:
    """Raise Failed unless two devices give the same probabilities, and mostly the right classes."""
    pairs = [(dict(a.classes), dict(b.classes)) for a, b in zip(ours, theirs, strict=True)]
    apart = max(abs(a[name] - b[name]) for a, b in pairs for name in b)
    # Convolutions in TF32, PyTorch's own choice, move a probability by a thousandth or so.
    if not apart <= 0.01:
        raise Failed(f"probabilities differ by {apart:.2g} from those on the CPU")
    hits = fmean(said.classes[0][0] == name for said, name in zip(ours, right, strict=True))
    if hits < 0.4:
        raise Failed(f"{100 * hits:.0f} % of {len(right)} images are named rightly")
    return f"{100 * hits:.0f} % of {len(right)} images named rightly, probabilities differ by {apart:.0e}"


CHECKS: dict[str, Check] = {
    "device": whats_there,
    "digits": learn_digits,
    "raw store": learn_raw_store,
    "encoded store": learn_encoded_store,
    "ViT-B/16": learn_vit,
    "as on the CPU": as_on_the_cpu,
    "resume": resume,
    "alignment": learn_aligned,
    "predict": answer_images,
    "two workers": two_workers,
}
"""Name -> check, in the order of the table."""

BEYOND_A_TRIAL = ("device", "as on the CPU", "resume")
"""Checks of all that a trial's first task does not show."""
