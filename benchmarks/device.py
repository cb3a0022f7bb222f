"""What a training step asks of a GPU, counted: kernels, copies from the host, moments in which the host waits.

python -m benchmarks.device        a minute, on any machine; a table, and benchmarks/device.json

Runs of two tasks on the simulated device of ``tests/simulated_gpu.py``, by a vision transformer with the 12 blocks of
ViT-B and next to no width: how many kernels a step has depends on the blocks, not on their size. A kernel is counted
for every operation that PyTorch's dispatcher sees on the device, views and empty tensors left out.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from inflora import continual, training
from inflora.config import parse_config
from inflora.data import DATASETS, prepare_store
from inflora.data.source import Arrays, Dataset, Options, Source
from tests.simulated_gpu import Count, simulated_gpu

TASKS, CLASSES, PER_CLASS, BATCH = 2, 6, 80, 16
KINDS: dict[str, dict[str, Any]] = {
    "raw store, fp32": {"data": "raw"},
    "raw store, bf16": {"data": "raw", "precision": "bf16"},
    "encoded store, bf16": {"data": "encoded", "precision": "bf16"},
    "raw store, normalised": {"data": "raw", "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
}


def write_source(folder: Path) -> None:
    """Images of noise, all of one size."""
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(CLASSES):
            (folder / split / str(label)).mkdir(parents=True)
            for index in range(PER_CLASS):
                pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / str(label) / f"{index}.png")


def write_raw(root: Path) -> None:
    """A store of arrays, as CIFAR's."""
    random, labels = np.random.default_rng(0), np.repeat(np.arange(CLASSES), PER_CLASS)
    arrays = Arrays(random.integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8), labels)
    source = Source("noise", tuple(map(str, range(CLASSES))), {"train": arrays, "test": arrays})
    prepare_store("raw", Dataset(lambda *_: source, needs=None), root, Options(), str(root))


def steps_of(root: Path, data: str, precision: str = "fp32", **normalisation: Any) -> dict[str, float]:
    """The mean over all training steps of what each asks of the device."""
    config = parse_config(
        {
            "data": {"dataset": data, "root": root, "tasks": CLASSES // 2, **normalisation},
            "backbone": {
                "name": "glyph_vit",
                "pretrained": False,
                "options": {"in_chans": 3, "embed_dim": 48, "depth": 12, "num_heads": 3},
            },
            "optim": {"epochs": 1, "batch_size": BATCH},
            "adapter": "inflora",
            "device": "cuda",
            "precision": precision,
        }
    )
    total, steps = Count(), 0
    # A raw store is kept on the device; of an encoded one this is how a large one is read.
    with simulated_gpu(2**40 if data == "raw" else 0) as gpu, pytest.MonkeyPatch.context() as patch:
        real_task, real_step = continual.train_task, training.train_step

        def train_task(*arguments: Any) -> Any:
            before = replace(gpu.count)
            losses = real_task(*arguments)
            for field in fields(Count):
                setattr(total, field.name, getattr(total, field.name) + getattr(gpu.count - before, field.name))
            return losses

        def train_step(*arguments: Any) -> Any:
            nonlocal steps
            steps += 1
            return real_step(*arguments)

        patch.setattr(continual, "train_task", train_task)
        patch.setattr(training, "train_step", train_step)
        list(islice(continual.run(config), TASKS))
    return {name: value / steps for name, value in asdict(total).items()}


def show(rows: Mapping[str, Mapping[str, float]]) -> None:
    """A table with a line for each kind of run."""
    table = Table(title=f"a training step of {BATCH} images, 12 blocks, asks of the device")
    for column in ("", *(name.replace("_", " ") for name in next(iter(rows.values())))):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.2f}" if value < 100 else f"{value:.0f}" for value in row.values()))
    Console(width=130).print(table)


def main() -> None:
    """Count, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/device.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_source(root / "source")
        prepare_store("encoded", DATASETS["image_folder"], root / "source", Options(), str(root))
        write_raw(root)
        rows = {kind: steps_of(root, **options) for kind, options in KINDS.items()}
    show(rows)
    arguments.out.write_text(json.dumps({"torch": torch.__version__, "steps": rows}, indent=2))


if __name__ == "__main__":
    main()
