"""Every method on two streams of tasks, and InfLoRA over fifty tasks: writes its part of docs/results.md.

python benchmarks/methods.py            about half an hour on one core of its own; what is done is not done again

Every method has the same budget: the same epochs, batches and images, one rank for all that have one, and a learning
rate chosen from the same few by the final accuracy on validation images. With that rate it is then trained on
all training images with each seed and tested. Processor time is reported, so that a busy machine does not count.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from inflora.adapters.inflora import memory_of
from inflora.config import (
    METHODS,
    AugmentSettings,
    DataSettings,
    InfLoRASettings,
    LowRankSettings,
    OptimSettings,
    RunConfig,
    config_hash,
    method_of,
    override,
)
from inflora.continual import TaskResult, run
from inflora.data import DATASETS, prepare_store
from inflora.data.source import Arrays, Dataset, Options, Source
from inflora.data.store import Split
from inflora.data.stream import EvaluateOn
from inflora.files import write_atomically
from inflora.metrics import accuracy_row
from inflora.training import EpochDone

LRS = (2e-4, 1e-3, 5e-3)
SEEDS = (0, 1, 2)
RANK = 16
OPTIM = OptimSettings(batch_size=16, head_init="zero")
EPOCHS = {"digits": 4, "strokes": 6}
AUGMENT = AugmentSettings(scale=(0.8, 1.0), flip=False)
STREAMS = {
    "digits": DataSettings(dataset="digits", tasks=5, order_seed=1993, validation=0.2, augment=AUGMENT),
    "strokes": DataSettings(dataset="strokes", tasks=10, validation=0.2, augment=AUGMENT),
}
LONG = RunConfig(
    data=DataSettings(dataset="many_strokes", tasks=50, augment=AUGMENT),
    adapter=InfLoRASettings(rank=RANK),
    optim=OptimSettings(epochs=5, lr=1e-3, batch_size=16, head_init="zero"),
    device="cpu",
)
TITLE = "## Methods side by side"
ALIGNED = "inflora-ca"
ROWS: dict[str, dict[str, Any]] = METHODS | {
    ALIGNED: {"adapter": "inflora", "classifier": {"name": "aligned", "epochs": 5, "temperature": 0.1}}
}
"""A row of the tables, by its name: the pair of adapter and classifier, and what differs from their defaults."""
COLUMNS = {
    "acc/final": "final",
    "acc/avg_incremental": "average incremental",
    "forgetting": "forgetting",
    "acc/new_mean": "new task",
    "acc/task_aware": "task known",
    "acc/task_identity": "right task",
}


# Generated images: strokes of a pen. A class is a pair of curves; every image draws them anew with an unsteady hand.

SIZE, FINE = 32, 4
UNSTEADY = 0.06


def drawn(curves: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One image (H, W, 1) uint8 of a class, given its curves' control points (curves x 3 x 2, in [0, 1])."""
    moved = curves + random.normal(0, UNSTEADY, curves.shape)
    centred = (moved - 0.5) * random.uniform(0.8, 1.1) + 0.5 + random.normal(0, 0.04, 2)
    t = np.linspace(0, 1, 20)[:, None]
    canvas = Image.new("L", (SIZE * FINE, SIZE * FINE))
    pen, width = ImageDraw.Draw(canvas), int(random.integers(8, 17))
    for start, middle, end in centred * SIZE * FINE:
        points = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end
        pen.line([tuple(point) for point in points], fill=255, width=width, joint="curve")
    pixels = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=float)
    return (pixels + random.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8)[..., None]


def strokes(classes: int, train: int, test: int) -> Dataset:
    """A dataset of ``classes`` kinds of strokes with so many images of each; always the same ones."""

    def read(source: Path, options: Options, scratch: Path) -> Source:
        random = np.random.default_rng(0)
        kinds = random.uniform(0.15, 0.85, (classes, 2, 3, 2))

        def split(per_class: int) -> Arrays:
            images = [drawn(kinds[label], random) for label in range(classes) for _ in range(per_class)]
            return Arrays(np.stack(images), np.repeat(np.arange(classes), per_class))

        splits: dict[Split, Arrays] = {"train": split(train), "test": split(test)}
        return Source("generated strokes", tuple(f"stroke {label}" for label in range(classes)), splits)

    return Dataset(read, needs=None)


STORES = {"digits": DATASETS["digits"], "strokes": strokes(20, 40, 30), "many_strokes": strokes(100, 10, 3)}


# Runs, each of them a file of what it showed.


def config_of(stream: DataSettings, row: str, lr: float, seed: int) -> RunConfig:
    """One run's settings: a method's own defaults, but the common rank and budget."""
    base = RunConfig(data=stream, optim=OPTIM, seed=seed, device="cpu")
    config = override(base, {**ROWS[row], "optim.lr": lr, "optim.epochs": EPOCHS[stream.dataset]})
    return override(config, {"adapter.rank": RANK}) if isinstance(config.adapter, LowRankSettings) else config


def shown_by(config: RunConfig, evaluate_on: EvaluateOn) -> dict[str, float]:
    """What a whole run shows: metrics, and the processor time of a task."""
    results: list[TaskResult] = []
    start = time.process_time()
    for result in run(config, evaluate_on=evaluate_on):
        results.append(result)
    new = [accuracy_row(evaluation)[-1] for evaluation in results[-1].state.evaluations]
    return results[-1].metrics | {
        "acc/new_mean": statistics.fmean(new),
        "seconds": (time.process_time() - start) / len(results),
        "params": statistics.fmean(result.metrics["params/trainable"] for result in results),
    }


def remembered(config: RunConfig, evaluate_on: EvaluateOn, folder: Path) -> dict[str, float]:
    """``shown_by``, or what it gave when it was asked before."""
    method = method_of(config)
    file = folder / f"{config.data.dataset}-{method}-{config_hash(config)}-{evaluate_on}.json"
    if not file.exists():
        start = time.perf_counter()
        shown = shown_by(config, evaluate_on)
        write_atomically(file, json.dumps(shown, indent=2).encode())
        took = f"{time.perf_counter() - start:.0f} s"
        print(f"{file.stem}: lr {config.optim.lr:g}, seed {config.seed}: {shown['acc/final']:.3f}, {took}", flush=True)
    return json.loads(file.read_text())


def compared(stream: DataSettings, row: str, folder: Path) -> dict[str, Any]:
    """The chosen learning rate of a row, and what its final runs show, seed by seed."""
    lrs = LRS if row != "ncm" else LRS[:1]  # nothing is trained
    tried = {lr: remembered(config_of(stream, row, lr, 0), "validation", folder)["acc/final"] for lr in lrs}
    lr = max(tried, key=lambda each: tried[each])
    whole = stream.model_copy(update={"train_on": "train+validation"})
    finals = [remembered(config_of(whole, row, lr, seed), "test", folder) for seed in SEEDS]
    return {"lr": lr, **{name: [final[name] for final in finals] for name in (*COLUMNS, "seconds", "params")}}


# Fifty tasks.


def fifty_tasks(folder: Path, root: Path) -> dict[str, Any]:
    """The memory's orthonormality and the time of an epoch, task by task."""
    file = folder / f"fifty-{config_hash(LONG)}.json"
    if not file.exists():
        ends: list[tuple[int, float]] = []

        def on_epoch(done: EpochDone) -> None:
            ends.append((done.task, time.process_time()))

        errors, sizes, accuracies = [], [], []
        for result in run(override(LONG, {"data.root": str(root)}), evaluate_on="test", on_epoch=on_epoch):
            bases = [memory.basis_DK for memory in memory_of(result.state.adapter).values()]
            errors.append(max(float((M.T @ M - torch.eye(M.shape[1])).abs().max()) for M in bases if M.numel()))
            sizes.append(max(M.shape[1] for M in bases))
            accuracies.append(result.metrics["acc/task_aware"])
        times = [[at for task, at in ends if task == index] for index in range(len(errors))]
        epochs = [(task[-1] - task[0]) / (len(task) - 1) for task in times]
        width = len(bases[0])
        shown = {"errors": errors, "sizes": sizes, "epochs": epochs, "task_aware": accuracies, "width": width}
        write_atomically(file, json.dumps(shown).encode())
    return json.loads(file.read_text())


def fifty_lines(shown: Mapping[str, Any]) -> list[str]:
    """The section on fifty tasks."""
    epochs = shown["epochs"]
    early, late = (f"{1000 * statistics.median(part):.0f}" for part in (epochs[:10], epochs[-10:]))
    first, last = (f"{min(part) * 1000:.0f}-{max(part) * 1000:.0f}" for part in (epochs[:10], epochs[-10:]))
    return [
        "### Fifty tasks",
        "",
        f"InfLoRA with glyph_vit on {len(epochs)} tasks of 2 generated classes each (10 training images a class):",
        "",
        "| | |",
        "|---|---|",
        f"| largest entry of abs(M^T M - I), all blocks and tasks | {max(shown['errors']):.1e} |",
        f"| the same after the last task | {shown['errors'][-1]:.1e} |",
        f"| most columns of a stored basis, of D = {shown['width']} | {max(shown['sizes'])} |",
        f"| time of an epoch, tasks 1-10, median (range) | {early} ms ({first}) |",
        f"| time of an epoch, the last ten tasks | {late} ms ({last}) |",
        f"| accuracy when the task is known, at the end | {100 * shown['task_aware'][-1]:.1f} % |",
        "",
    ]


# The report.


def cell(values: Sequence[float]) -> str:
    """Mean and sample standard deviation in percent."""
    return f"{100 * statistics.fmean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A row per method, the best final accuracy first."""
    header = ["method", *COLUMNS.values(), "trainable", "s per task", "lr"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for method, row in sorted(rows.items(), key=lambda item: -statistics.fmean(item[1]["acc/final"])):
        cells = [method, *(cell(row[name]) for name in COLUMNS), f"{statistics.fmean(row['params']):,.0f}"]
        cells += [f"{statistics.fmean(row['seconds']):.1f}", f"{row['lr']:g}" if method != "ncm" else "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def reading(rows: Mapping[str, Mapping[str, Any]], ours: str) -> list[str]:
    """Where a form of InfLoRA stands against the others, and where another's lead comes from."""

    def lead(other: str, name: str) -> float:
        return 100 * (statistics.fmean(rows[ours][name]) - statistics.fmean(rows[other][name]))

    leads = {other: lead(other, "acc/final") for other in rows if other not in ("inflora", ALIGNED, "joint")}
    beaten = ", ".join(f"{other} ({by:.1f})" for other, by in leads.items() if by > 0)
    lines = [f"- `{ours}` is above, by so many points of final accuracy: {beaten or 'none'}."]
    for other, by in leads.items():
        if by <= 0:
            facts = {"acc/task_identity": "in finding the right task", "acc/task_aware": "with the task known"}
            facts |= {"acc/new_mean": "on the newest task", "forgetting": "in forgetting (less is better)"}
            gaps = ", ".join(f"{lead(other, name):+.1f} {what}" for name, what in facts.items())
            lines.append(f"- It is {-by:.1f} points below {other}. `{ours}` minus {other}: {gaps}.")
    return lines


def at_the_edge(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """For which methods rates beyond the few tried might have been better."""
    lowest, highest = ([row for row in rows if row != "ncm" and rows[row]["lr"] == lr] for lr in (LRS[0], LRS[-1]))
    return (
        f"- The lowest rate tried was the best for {', '.join(lowest) or 'none'}, the highest for "
        f"{', '.join(highest) or 'none'}: a wider search could give these more."
    )


def report(streams: Mapping[str, Mapping[str, Mapping[str, Any]]], fifty: Mapping[str, Any]) -> str:
    """The part of docs/results.md from its title on."""
    lines = [
        TITLE,
        "",
        "Written by `python benchmarks/methods.py`, where every setting is to be seen. The shipped glyph_vit,",
        f"batches of {OPTIM.batch_size}, rank {RANK} where a method has one; all else are the methods' defaults, and",
        "nothing but the learning rate is tuned: of " + ", ".join(f"{lr:g}" for lr in LRS),
        "the one with the best final accuracy on validation images (seed 0). With it the method is trained on all",
        f"training images and tested, with seeds {', '.join(map(str, SEEDS))}. In percent: mean ± sample standard",
        f"deviation over the seeds. `{ALIGNED}`: with classifier alignment, as in the paper's InfLoRA + CA. Seconds",
        "are processor time on one core, evaluation and all.",
        "",
        "`new task`: mean over tasks of the accuracy on a task just learnt, among all classes seen. `task known`:",
        "final accuracy when each image's task is known. `right task`: how often the predicted class lies in the",
        "right task. `trainable`: numbers trained in a task, its classifier's among them. Joint training has one",
        "task, so that nothing is forgotten and its task is always known.",
        "",
    ]
    for name, rows in streams.items():
        stream = STREAMS[name]
        what = {"digits": "Real scans", "strokes": "Generated: two bent strokes a class, drawn with an unsteady hand"}
        lines += [f"### {name}, {stream.task_count} tasks", "", f"{what[name]}; {EPOCHS[name]} epochs a task.", ""]
        lines += [*table(rows), "", *reading(rows, "inflora"), *reading(rows, ALIGNED)]
        lines += [at_the_edge(rows), ""]
    return "\n".join(lines + fifty_lines(fifty))


def main() -> None:
    """Do what is not done yet and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("results/methods"), help="what is done, one file a run")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    root = arguments.folder / "data"
    for name, dataset in STORES.items():
        if not (root / name).exists():
            prepare_store(name, dataset, Path(), Options(), str(root))
    fifty = fifty_tasks(arguments.folder, root)
    streams = {
        name: {row: compared(stream.model_copy(update={"root": str(root)}), row, arguments.folder) for row in ROWS}
        for name, stream in STREAMS.items()
    }
    before = arguments.out.read_text().partition(TITLE)[0] if arguments.out.exists() else ""
    write_atomically(arguments.out, f"{before}{report(streams, fifty)}".encode())


if __name__ == "__main__":
    main()
