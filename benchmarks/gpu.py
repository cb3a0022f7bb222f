"""One GPU: how much of its matrix rate a run uses, and how long a CIFAR-100 trial takes on it.

python benchmarks/gpu.py                           about ten minutes; tables, and benchmarks/gpu.json
python benchmarks/gpu.py --smoke --out /tmp/x      the same on the CPU with a tiny model: only that it runs

Steps against the floor of ``step.py`` in the same process; batch sizes, compilation, and two and four trials at a time
on the one card; then a whole run, 10 tasks of 5,000 generated images of CIFAR's shape for 20 epochs each, with all its
passes, from a randomly initialised backbone. Needs no Ray.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
import torch
from step import Step, algebra, covariance_pass, floor_step, forward_pass, our_step, processor, ratio, show, turns

from inflora.config import BackboneSettings, DataSettings, InfLoRASettings, OptimSettings, Precision, RunConfig
from inflora.continual import run
from inflora.data import prepare_store
from inflora.data.source import Arrays, Dataset, Options, Source
from inflora.training import EpochDone

GFLOP_PER_IMAGE = {"vit_base_patch16_224": 70.0, "vit_tiny_patch16_224": 5.0}
"""Forward, and the backward to the layers' inputs."""


class Size(NamedTuple):
    """How much is measured."""

    device: str
    model: str
    batches: tuple[int, ...]
    batch: int
    side_of_matrix: int
    classes: int
    images_per_class: int
    epochs: int
    rounds: int
    seconds: float


WHOLE = Size("cuda", "vit_base_patch16_224", (32, 64, 128, 256), 128, 8192, 100, 500, 20, 20, 10.0)
SMOKE = Size("cpu", "vit_tiny_patch16_224", (1, 2), 2, 256, 10, 5, 1, 1, 0.1)


def matrix_tflops(side: int, device: str) -> float:
    """Rate of one large bfloat16 product, the best of some."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in "ab")
    return 2 * side**3 / min(turns({"product": lambda: a @ b}, 20, device)["product"]) / 1e12


def peak_mb(step: Step) -> float:
    """Peak memory of a step, all that is on the card included; 0 on a CPU (``step.py`` measures it there)."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**20


def against_the_floor(size: Size) -> dict[str, float]:
    """The ratios of ``step.py`` at the size that trials have."""
    what = (size.model, "bf16", size.batch, size.device)
    peaks = {}
    for name, make in {"floor": floor_step, "ours": our_step}.items():
        step = make(*what)
        step()
        peaks[name] = peak_mb(step)
        del step
    sides = {"floor": floor_step(*what), "ours": our_step(*what), "task 20": our_step(*what, tasks_done=19)}
    steps = turns(sides, size.rounds, size.device)
    del sides
    passes = {"floor": forward_pass(*what), "covariance": covariance_pass(*what)}
    passes_s = turns(passes, size.rounds, size.device)
    return {
        "step / floor": ratio(steps, "ours", "floor"),
        "memory / floor": peaks["ours"] / peaks["floor"] if peaks["floor"] else float("nan"),
        "task 20 / task 1": ratio(steps, "task 20", "ours"),
        "covariance / forward": ratio(passes_s, "covariance", "floor"),
    }


def step_rates(size: Size, tflops: float) -> dict[str, dict[str, float]]:
    """Images per second and share of bf16's matrix rate: by batch size, with compilation, in other precisions."""
    kinds: list[tuple[int, Precision, bool]] = [(batch, "bf16", False) for batch in size.batches]
    if size.device == "cuda":
        kinds += [(size.batch, "bf16", True), (size.batch, "tf32", False), (size.batch, "fp32", False)]
    rows = {}
    for batch, precision, compiled in kinds:
        step = our_step(size.model, precision, batch, size.device, compiled=compiled)
        start = time.perf_counter()
        step()
        first_s = time.perf_counter() - start
        images_s = batch / median(turns({"step": step}, size.rounds, size.device)["step"])
        rows[f"{precision}, batch {batch}{', compiled' if compiled else ''}"] = {
            "images/s": images_s,
            "share of matrix rate": images_s * GFLOP_PER_IMAGE[size.model] / 1000 / tflops,
            "first step s": first_s,
            "peak MB": peak_mb(step),
        }
        del step
    return rows


def side_by_side(size: Size, trials: int) -> float:
    """Images per second of ``trials`` processes on the one card, all together."""
    context = multiprocessing.get_context("spawn")
    ready, rates = context.Barrier(trials), context.SimpleQueue()
    processes = [context.Process(target=_one_of_several, args=(size, ready, rates)) for _ in range(trials)]
    for process in processes:
        process.start()
    total = sum(rates.get() for _ in processes)
    for process in processes:
        process.join()
    return total


def _one_of_several(size: Size, ready: Any, rates: Any) -> None:
    step = our_step(size.model, "bf16", size.batch, size.device)
    turns({"step": step}, 2, size.device)
    ready.wait(timeout=300)
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < size.seconds:
        turns_s = turns({"step": step}, 1, size.device)["step"]
        images += size.batch * (len(turns_s) + 1)
    rates.put(images / (time.perf_counter() - start))


def whole_trial(size: Size) -> dict[str, float]:
    """Seconds of a whole run on generated images, and the share of its epochs' time spent waiting for data."""
    random, classes = np.random.default_rng(0), size.classes

    def split(per_class: int) -> Arrays:
        pixels = random.integers(0, 256, (classes * per_class, 32, 32, 3), dtype=np.uint8)
        return Arrays(pixels, np.repeat(np.arange(classes), per_class))

    names = tuple(f"{index:03}" for index in range(classes))
    parts = {"train": split(size.images_per_class), "test": split(size.images_per_class // 5)}
    waits: list[float] = []

    def on_epoch(done: EpochDone) -> None:
        waits.append(done.data_wait)

    with tempfile.TemporaryDirectory() as root:
        dataset = Dataset(lambda *_: Source("generated", names, parts), needs=None)
        prepare_store("generated", dataset, Path(root), Options(), root=root)
        config = RunConfig(
            data=DataSettings(dataset="generated", root=root, tasks=10, train_on="train+validation"),
            backbone=BackboneSettings(name=size.model, pretrained=False),
            adapter=InfLoRASettings(),
            optim=OptimSettings(epochs=size.epochs, batch_size=size.batch if size.device == "cuda" else 128),
            device=size.device,
            precision="bf16",
        )
        start = time.perf_counter()
        tasks_s = [result.seconds for result in run(config, evaluate_on="test", on_epoch=on_epoch)]
        whole_s = time.perf_counter() - start
    return {"trial s": whole_s, "first task s": tasks_s[0], "last task s": tasks_s[-1], "waits for data": fmean(waits)}


def main() -> None:
    """Measure, print, and keep with date and hardware."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="on the CPU, tiny: the figures mean nothing")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/gpu.json"))
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --smoke only tries that it runs")
    size = SMOKE if arguments.smoke else WHOLE
    hardware = f"{processor()}, a smoke test" if arguments.smoke else torch.cuda.get_device_name()
    tflops = matrix_tflops(size.side_of_matrix, size.device)
    floor = against_the_floor(size)
    show(f"{size.model}, bf16, batch {size.batch}, {hardware}", {"": floor})
    rates = step_rates(size, tflops)
    show(f"training steps; the matrix rate is {tflops:.1f} TFLOP/s", rates)
    together = {f"{trials} at a time": {"images/s": side_by_side(size, trials)} for trials in (1, 2, 4)}
    show("trials sharing the device", together)
    cost = {} if arguments.smoke else algebra(768, 12, size.device)
    trial = whole_trial(size)
    show(f"a whole run: 10 tasks, {size.epochs} epochs", {"": trial | cost})
    facts = {"date": date.today().isoformat(), "hardware": hardware, "torch": torch.__version__, "tflops": tflops}
    measured = {"floor": floor, "steps": rates, "together": together, "algebra_s": cost, "trial": trial}
    arguments.out.write_text(json.dumps({**facts, **measured}, indent=2))


if __name__ == "__main__":
    main()
