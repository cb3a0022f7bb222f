"""A training step, a covariance pass and the linear algebra between tasks, against what plain timm needs.

python benchmarks/step.py                         CPU, about six minutes; a table, and benchmarks/step.json
python benchmarks/step.py --batch 4 --threads 1

The floor is the same timm model with the same batch in the same precision: forward, and the backward that adapters in
all blocks make necessary: from the loss to the output of the first block's ``qkv``, through frozen weights, with
nothing trained but the classifier. Both sides run in one process and take turns; a ratio is the median over the rounds
of processor time (wall time on a GPU), so that whatever else the machine does slows neither. Peak memory is that of a
process of its own for each side, less what it had before the model.
"""

import argparse
import ctypes
import json
import multiprocessing
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from inflora.adapters import make_adapter
from inflora.backbone import build_backbone, shape_of
from inflora.classifiers.linear import Linear
from inflora.config import BackboneSettings, InfLoRASettings, LinearSettings, OptimSettings, Precision
from inflora.covariance import gather_covariance
from inflora.data.loader import Batch
from inflora.data.stream import Task
from inflora.lora import adapted_layers
from inflora.model import ContinualModel
from inflora.subspace import Memory, design, energy_inside, update
from inflora.training import make_optimizer, train_step, trainable

CLASSES = 10
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
CIFAR100_TASK = {"images": 5000, "epochs": 20}
Step = Callable[[], object]


def network(name: str, precision: Precision, device: str) -> ContinualModel:
    """A randomly initialised backbone without adapters."""
    backbone = build_backbone(BackboneSettings(name=name, pretrained=False))
    classifier = Linear(LinearSettings(), backbone.embed_dim)
    return ContinualModel(backbone, classifier, precision).to(device)


def batch_for(model: ContinualModel, size: int) -> Batch:
    """Noise with labels."""
    generator = torch.Generator().manual_seed(0)
    shape = shape_of(model.backbone)
    images = torch.randn(size, shape.channels, shape.image_size, shape.image_size, generator=generator)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    return Batch(images.to(model.device), labels.to(model.device), share=1.0)


def floor_step(name: str, precision: str, size: int, device: str) -> Step:
    """The same forward and backward in plain timm, only the classifier trained."""
    model = network(name, precision, device)
    vit, batch = model.backbone, batch_for(model, size)
    head = nn.Linear(vit.embed_dim, CLASSES, device=device)
    # Gradients must flow to the place of the first block's adapter, and not further.
    vit.blocks[0].attn.qkv.register_forward_hook(lambda _, __, out: out.requires_grad_())
    optimizer = torch.optim.Adam(head.parameters())

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            features = vit(batch.images)
        nn.functional.cross_entropy(head(features.float()), batch.labels).backward()
        optimizer.step()

    return step


def our_step(name: str, precision: str, size: int, device: str, tasks_done: int = 0, *, compiled: bool = False) -> Step:
    """A training step of InfLoRA as a run makes it, after ``tasks_done`` tasks."""
    model, rank = network(name, precision, device), 10
    adapter = make_adapter(InfLoRASettings(rank=rank))
    adapter.prepare(model)
    model.settle_on(torch.device(device))
    if compiled:
        model.backbone.compile()
    task = Task(tasks_done, 0, tuple(map(str, range(CLASSES))), torch.arange(0), torch.arange(0))
    generator = torch.Generator().manual_seed(0)
    for _ in range(tasks_done + 1):
        for _, layer in adapted_layers(model):
            layer.merge()
            layer.attach(torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5)
        model.classifier.heads.append(nn.Linear(model.width, CLASSES, device=device))
    trained, batch = trainable(model, adapter), batch_for(model, size)
    optimizer = make_optimizer(trained, OptimSettings())
    return lambda: train_step(model, adapter, task, optimizer, trained, batch)


SIDES = {"floor": floor_step, "ours": our_step}


def forward_pass(name: str, precision: str, size: int, device: str) -> Step:
    """What a pass without gradients costs in plain timm."""
    model = network(name, precision, device)
    batch = batch_for(model, size)

    def step() -> None:
        with torch.no_grad():
            model.features(batch.images)

    return step


def covariance_pass(name: str, precision: str, size: int, device: str) -> Step:
    """The same while the covariances of all blocks' inputs are gathered."""
    model = network(name, precision, device)
    make_adapter(InfLoRASettings()).prepare(model)
    model.settle_on(torch.device(device))
    batch = batch_for(model, size)

    def step() -> None:
        with torch.no_grad(), gather_covariance(model):
            model.features(batch.images)

    return step


def seconds(step: Step, device: str) -> float:
    """Processor time of one call; on a GPU the time until it is done."""
    if device == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    step()
    return time.process_time() - start


def turns(sides: Mapping[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every side in each round; who begins changes, the first call of each is not counted."""
    for step in sides.values():
        step()
    names = list(sides)
    measured: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            measured[name].append(seconds(sides[name], device))
    return measured


def ratio(measured: Mapping[str, list[float]], of: str, to: str) -> float:
    """Median over the rounds of one side's time by the other's."""
    return median(a / b for a, b in zip(measured[of], measured[to], strict=True))


def peak_mb(make: Callable[[str, str, int, str], Step], *what: Any) -> float:
    """Peak memory of two steps on the CPU, the model included, in a process of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_peak_mb, (make, *what))


def _peak_mb(make: Callable[[str, str, int, str], Step], *what: Any) -> float:
    # What is freed must go back to the system at once, or the peak is that of the allocator's caches.
    m_mmap_threshold = -3
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 64 * 1024)
    before = _status_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    step = make(*what)
    step()
    step()
    return _status_mb("VmHWM") - before


def _status_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def algebra(width: int, blocks: int, device: str, rank: int = 10) -> dict[str, float]:
    """Seconds of the designs of A and of the memory's updates for ``blocks`` blocks together, as in a later task."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -4, width)

    def covariance() -> torch.Tensor:
        inputs = torch.randn(4 * width, width, generator=generator) * spectrum
        mixed = inputs @ torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
        return (mixed.T @ mixed / len(mixed)).double().to(device)

    first, now = ([covariance() for _ in range(blocks)] for _ in range(2))
    removed = update([None] * blocks, first, 0.95)
    memories = {"remove": removed, "retain": update(removed, now, 0.9999999)}
    cost: dict[str, float] = {}
    for kind, kept in memories.items():
        assert {memory.kind for memory in kept} == {kind}

        def once(kept: Sequence[Memory] = kept) -> None:
            for cov_DD, memory in zip(now, kept, strict=True):
                energy_inside(cov_DD, memory)
            design(now, kept, rank)

        def after(kept: Sequence[Memory] = kept) -> None:
            for cov_DD, memory in zip(now, update(kept, now, 0.96), strict=True):
                energy_inside(cov_DD, memory)

        cost[f"design, memory of kind {kind}"] = median(seconds(once, device) for _ in range(3))
        cost[f"update, memory of kind {kind}"] = median(seconds(after, device) for _ in range(3))
    return cost


def measure(name: str, precision: str, size: int, rounds: int) -> dict[str, float]:
    """The times of one model in one precision."""
    what = (name, precision, size, "cpu")
    training = {"floor": floor_step(*what), "ours": our_step(*what), "task 20": our_step(*what, tasks_done=19)}
    steps = turns(training, rounds, "cpu")
    del training
    passes = turns({"floor": forward_pass(*what), "covariance": covariance_pass(*what)}, rounds, "cpu")
    return {
        "batch": size,
        "floor s": median(steps["floor"]),
        "step s": median(steps["ours"]),
        "step / floor": ratio(steps, "ours", "floor"),
        "task 20 / task 1": ratio(steps, "task 20", "ours"),
        "covariance / forward": ratio(passes, "covariance", "floor"),
    }


def task_share(algebra_s: Mapping[str, float], step_s: float, size: int) -> dict[str, float]:
    """The dearest linear algebra of a task as a share of a CIFAR-100 task's steps: extrapolated from one step."""
    task_s = CIFAR100_TASK["images"] * CIFAR100_TASK["epochs"] * step_s / size
    dearest = sum(max(s for name, s in algebra_s.items() if name.startswith(part)) for part in ("design", "update"))
    return {"task s, extrapolated": task_s, "algebra s": dearest, "share": dearest / task_s}


def show(title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    """A table with a line for each row."""
    table = Table(title=title)
    for column in ("", *next(iter(rows.values()))):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in row.values()))
    Console(width=130).print(table)


def processor() -> str:
    """The CPU's name, as the kernel knows it."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor()


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224", "vit_base_patch16_224"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/step.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    what = [(name, precision) for name in arguments.models for precision in arguments.precisions]
    # First of all, from a process that has not computed: the children are forks, and OpenMP's threads survive none.
    peaks = {
        each: {side: peak_mb(make, *each, arguments.batch, "cpu") for side, make in SIDES.items()} for each in what
    }
    rows = {}
    for each in what:
        memory = {"peak MB": peaks[each]["ours"], "memory / floor": peaks[each]["ours"] / peaks[each]["floor"]}
        rows[", ".join(each)] = measure(*each, arguments.batch, arguments.rounds) | memory
    threads = torch.get_num_threads()
    show(f"training step and covariance pass, rank 10, {threads} threads of {processor()}", rows)
    cost = algebra(768, 12, "cpu")
    shares = {name: task_share(cost, row["step s"], arguments.batch) for name, row in rows.items()}
    show("linear algebra of 12 blocks, D = 768, seconds per task", {"": cost})
    show("its share of a CIFAR-100 task (5,000 images, 20 epochs)", shares)
    facts = {"date": date.today().isoformat(), "cpu": processor(), "threads": threads, "torch": torch.__version__}
    arguments.out.write_text(json.dumps({**facts, "steps": rows, "algebra_s": cost, "shares": shares}, indent=2))


if __name__ == "__main__":
    main()
