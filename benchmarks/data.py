"""The data path against torchvision's DataLoader doing the same work: images per second, as ratios.

python benchmarks/data.py            about two minutes; prints a table and writes benchmarks/data.json

Both sides use the same number of workers (threads here, processes there) and the rounds take turns, so that whatever
else the machine does slows both. ``--seconds`` is the time of each round.
"""

import argparse
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from inflora.config import AugmentSettings, DataSettings
from inflora.data.loader import InputFormat, training_batches
from inflora.data.preparation import prepare
from inflora.data.source import Arrays, Entry, Files, Options, Source
from inflora.data.source import Dataset as Kind
from inflora.data.store import open_split

SIDE, BATCH = 224, 64
WORKERS = len(os.sched_getaffinity(0))


class Memory:
    """A tree of files in memory."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.names = files, frozenset(files)

    def read(self, name: str) -> bytes:
        """The content of one file."""
        return self.files[name]


class Pictures(Dataset):
    """What torchvision's datasets do: open, transform."""

    def __init__(self, load: Callable[[int], Image.Image], count: int, transform: Callable) -> None:
        self.load, self.count, self.transform = load, count, transform

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.transform(self.load(row))


def photographs(count: int) -> list[bytes]:
    """JPEGs of about ImageNet's size: smooth colours with some detail."""
    random, files = np.random.default_rng(0), []
    for _ in range(count):
        width, height = int(random.integers(350, 500)), int(random.integers(300, 400))
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height))
        noisy = np.asarray(coarse).astype(int) + random.integers(-12, 12, (height, width, 3))
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def our_passes(folder: Path) -> Iterator[int]:
    """Sizes of augmented batches, pass after pass."""
    images = open_split(folder, "train")
    input_format = InputFormat(DataSettings(augment=AugmentSettings()), SIDE, 3, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    while True:
        for batch in training_batches(images, torch.arange(len(images.labels)), input_format, BATCH, generator):
            yield len(batch.images)


def their_passes(load: Callable[[int], Image.Image], count: int) -> Iterator[int]:
    """The same by torchvision's transforms in DataLoader's workers."""
    augment = [transforms.RandomResizedCrop(SIDE), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    pictures = Pictures(load, count, transforms.Compose(augment))
    loader = DataLoader(pictures, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    while True:
        for batch in loader:
            yield len(batch)


def rates(sides: dict[str, Iterator[int]], seconds: float, rounds: int) -> dict[str, list[float]]:
    """Images per second of every side in each round, taking turns; the first batches are not counted."""
    for side in sides.values():
        for _ in range(3):
            next(side)
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            next(side)
            start, images = time.perf_counter(), 0
            while time.perf_counter() - start < seconds:
                images += next(side)
            measured[name].append(images / (time.perf_counter() - start))
    return measured


def source_of(images: Arrays | Files) -> Kind:
    """A dataset whose splits are both ``images``."""
    return Kind(lambda *_: Source("generated", ("a",), {"train": images, "test": images}), needs=None)


def prepared(folder: Path, images: Arrays | Files, shorter_side: int | None = None) -> float:
    """Images per second of preparing a store (both splits)."""
    start = time.perf_counter()
    manifest = prepare(folder, folder.name, source_of(images), Path(), Options(), shorter_side=shorter_side)
    return sum(split.images for split in manifest.splits.values()) / (time.perf_counter() - start)


def only_decoded(files: list[bytes]) -> float:
    """Images per second of DataLoader's workers decoding every file once."""
    pictures = Pictures(
        lambda row: Image.open(io.BytesIO(files[row])).convert("RGB"), len(files), transforms.PILToTensor()
    )
    start = time.perf_counter()
    for _ in DataLoader(pictures, None, num_workers=WORKERS):
        pass
    return len(files) / (time.perf_counter() - start)


def main() -> None:
    """Measure and say how the two compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/data.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as in training runs on few cores: the other ones decode
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (5000, 32, 32, 3), dtype=np.uint8)
    files = photographs(400)
    tree = Files(
        Memory({str(i): file for i, file in enumerate(files)}), tuple(Entry(str(i), 0) for i in range(len(files)))
    )
    rows: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        arrays_rate = prepared(root / "small", Arrays(small, np.zeros(len(small), np.int64)))
        encoded_rate = prepared(root / "encoded", tree)
        decoded_rate = prepared(root / "decoded", tree, shorter_side=256)
        decoding = only_decoded(files)
        sizes = {f.name: sum(p.stat().st_size for p in f.glob("train-*")) / len(files) / 1024 for f in root.iterdir()}
        rows["prepare, JPEG kept encoded"] = (encoded_rate, decoding)
        rows["prepare, JPEG decoded to 256"] = (decoded_rate, decoding)
        photograph = lambda row: Image.open(io.BytesIO(files[row])).convert("RGB")  # noqa: E731
        turns = {
            "training, 32 x 32 raw": ("small", lambda row: Image.fromarray(small[row]), len(small)),
            "training, JPEG encoded": ("encoded", photograph, len(files)),
            "training, JPEG decoded to 256": ("decoded", photograph, len(files)),
        }
        for label, (store, load, count) in turns.items():
            sides = {"ours": our_passes(root / store), "theirs": their_passes(load, count)}
            measured = rates(sides, arguments.seconds, arguments.rounds)
            rows[label] = (float(np.median(measured["ours"])), float(np.median(measured["theirs"])))
    table = Table(title=f"images per second, {WORKERS} CPUs, {SIDE} x {SIDE}, batches of {BATCH}")
    for column in ("", "here", "torchvision + DataLoader", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for label, (ours, theirs) in rows.items():
        table.add_row(label, f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}")
    Console(width=110).print(table)
    print(f"arrays are stored at {arrays_rate:.0f} images per second")
    print(f"KiB per image on disk: encoded {sizes['encoded']:.0f}, decoded to 256 {sizes['decoded']:.0f}")
    results = {
        label: {"here": ours, "torchvision": theirs, "ratio": ours / theirs} for label, (ours, theirs) in rows.items()
    }
    facts = {"arrays_prepared_per_s": arrays_rate, "kib_per_image": sizes, "cpus": WORKERS, "torch": torch.__version__}
    arguments.out.write_text(json.dumps({**results, **facts}, indent=2))


if __name__ == "__main__":
    main()
