"""Tables of learning curves: what they hold, how they are made and read.

A row is one training: a setting, a seed, and for every task the images of the tasks seen so far that it got right, as
packed bits, of the validation images and of the test images. Shapes: S settings, K seeds, T tasks, V images of all
tasks in the order of the tasks.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.stats import qmc
from table_streams import PAPER, Recorded, stream_named
from torch import Tensor

from inflora.backbone import build_backbone, shape_of
from inflora.config import RunConfig, config_hash, override
from inflora.data.loader import InputFormat, evaluation_batches
from inflora.data.stream import EvaluateOn, Stream, make_stream
from inflora.draws import Draws
from inflora.features import features_of
from inflora.learner import make_learner
from inflora.model import ContinualModel
from inflora.task_data import TaskData
from inflora.training import train_task
from sweeps.engine.space.domains import Space

SOBOL, SEEDS = 96, (0, 1, 2)
SPLITS: tuple[EvaluateOn, ...] = ("validation", "test")
SCHEMA = pa.schema(
    [
        ("setting", pa.int32()),
        ("seed", pa.int32()),
        ("failed", pa.bool_()),
        ("seconds", pa.float32()),
        *((split, pa.list_(pa.binary())) for split in SPLITS),
    ]
)


def settings_of(space: Space) -> list[dict[str, Any]]:
    """The settings that are recorded: the points of a Sobol sequence, and the paper's last, where the space has it."""
    points = qmc.Sobol(len(space), rng=0).random(SOBOL)
    rows = [{path: domain.at(float(u)) for (path, domain), u in zip(space.items(), row, strict=True)} for row in points]
    return [*rows, dict(PAPER)] if set(PAPER) == set(space) else rows


class Answers(NamedTuple):
    """Which images one training got right after each task: of every task a row of as many images as were seen."""

    validation: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...]


@cache
def _stream(config: str, evaluate_on: EvaluateOn) -> Stream:
    return make_stream(RunConfig.model_validate_json(config).data, evaluate_on)


@cache
def _backbone(config: str) -> Any:
    return build_backbone(RunConfig.model_validate_json(config).backbone)


def trained(base: RunConfig, settings: Mapping[str, Any], seed: int) -> Answers:
    """Learn the stream as ``inflora.continual.run`` does, looking at validation and test images after every task.

    The run itself never sees the test images: they are looked at here, for the truth that searches are judged by.

    Raises:
        FloatingPointError: The training went astray.
    """
    config = override(base, {**settings, "seed": seed})
    kept = base.model_dump_json()  # the same for all trainings of a stream: read once in a process
    streams = {split: _stream(kept, split) for split in SPLITS}
    backbone = copy.deepcopy(_backbone(kept))
    shape = shape_of(backbone)
    model, adapter = make_learner(config, backbone)
    device = torch.device("cpu")
    model.settle_on(device)
    input_format = InputFormat(config.data, shape.image_size, shape.channels, device)
    learnt, draws, classifier = streams["validation"], Draws(config.seed), model.classifier
    right: dict[EvaluateOn, list[np.ndarray]] = {split: [] for split in SPLITS}
    for task in learnt.tasks:
        optim = config.optim.of_task(task.index)
        data = TaskData(task, len(learnt.tasks), learnt.train, input_format, optim, draws)
        classifier.begin_task(data)
        moves = task.index > 0 and adapter.adapts(task.index) and classifier.follows_drift
        before = features_of(model, data, classifier.views) if moves else None
        adapter.begin_task(model, data)
        train_task(model, adapter, data, lambda _: None)
        adapter.end_task(model, data)
        if classifier.is_fitted:
            classifier.fit(features_of(model, data, classifier.views), before, data)
        for split in SPLITS:
            right[split].append(answers(model, streams[split], task.index + 1, input_format))
    return Answers(*(tuple(right[split]) for split in SPLITS))


@torch.no_grad()
def answers(model: ContinualModel, stream: Stream, tasks: int, input_format: InputFormat) -> np.ndarray:
    """Which images of the first ``tasks`` are told right (bool), all classes seen competing; task by task."""
    rows = torch.cat([task.eval_rows for task in stream.tasks[:tasks]])
    told: list[Tensor] = []
    for batch in evaluation_batches(stream.evaluate, rows, input_format, 256):
        logits = model(batch.images)
        if not logits.isfinite().all():
            raise FloatingPointError("the logits are not finite")
        told.append(logits.argmax(1) == batch.labels)
    return torch.cat(told).numpy()


def row_of(name: str, root: Path, setting: int, seed: int) -> pa.Table:
    """One training as a row."""
    recorded, base = located(name, root)
    start = process_time()
    try:
        told = trained(base, settings_of(recorded.sweep("table").space)[setting], seed)
    except FloatingPointError:
        told = None
    return as_row(setting, seed, told, process_time() - start)


def as_row(setting: int, seed: int, told: Answers | None, seconds: float) -> pa.Table:
    """A training as a row; None: it went astray."""
    curves = told._asdict() if told else dict.fromkeys(SPLITS, ())
    packed = {split: [[np.packbits(bits).tobytes() for bits in curve]] for split, curve in curves.items()}
    known = {"setting": [setting], "seed": [seed], "failed": [told is None], "seconds": [seconds]}
    return pa.table({**known, **packed}, schema=SCHEMA)


def located(name: str, root: Path) -> tuple[Recorded, RunConfig]:
    """A stream, and its run with the folder where its images are."""
    recorded = stream_named(name)
    return recorded, override(recorded.base, {"data.root": str(root)}) if recorded.images else recorded.base


def facts_of(name: str, root: Path) -> dict[str, Any]:
    """What a table says of itself: the run, the space, the images of each task, and all versions."""
    recorded, base = located(name, root)
    streams = {split: make_stream(base.data, split) for split in SPLITS}
    sweep = recorded.sweep("table")
    return {
        "stream": name,
        "base": json.loads(recorded.base.model_dump_json()),
        "space": {path: domain.model_dump(mode="json") for path, domain in sweep.space.items()},
        "settings": settings_of(sweep.space),
        "images": {split: [len(task.eval_rows) for task in streams[split].tasks] for split in SPLITS},
        "config_hash": config_hash(recorded.base),
        "dataset_hash": streams["validation"].manifest.content_hash,
        "split_hash": streams["validation"].split_hash,
        "versions": {package: version(package) for package in ("inflora-sweeps", "torch", "timm")},
    }


class Table(NamedTuple):
    """A recorded stream: its settings, and what each training of them got right.

    ``right`` of a split: setting, seed -> after each task the images told right (bool); None where it went astray.
    """

    facts: dict[str, Any]
    right: dict[EvaluateOn, dict[tuple[int, int], tuple[np.ndarray, ...] | None]]

    @property
    def settings(self) -> list[dict[str, Any]]:
        """All settings, in order."""
        return list(self.facts["settings"])

    @property
    def tasks(self) -> int:
        """The number of tasks."""
        return len(self.facts["images"]["validation"])

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds with which every setting was trained."""
        return tuple(sorted({seed for _, seed in self.right["test"]}))


def write_table(rows: list[pa.Table], facts: Mapping[str, Any], path: Path) -> None:
    """Keep all rows in one Parquet file, with the facts in its metadata."""
    table = pa.concat_tables(rows).sort_by([("setting", "ascending"), ("seed", "ascending")])
    table = table.replace_schema_metadata({"facts": json.dumps(facts)})
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".new")
    pq.write_table(table, draft, compression="zstd", compression_level=19)
    draft.rename(path)


def read_table(path: Path) -> Table:
    """What ``write_table`` has written."""
    table = pq.read_table(path)
    facts = json.loads(table.schema.metadata[b"facts"])
    right: dict[EvaluateOn, dict[tuple[int, int], tuple[np.ndarray, ...] | None]] = {split: {} for split in SPLITS}
    for row in table.to_pylist():
        for split in SPLITS:
            curve = None if row["failed"] else tuple(_unpacked(row[split], facts["images"][split]))
            right[split][row["setting"], row["seed"]] = curve
    return Table(facts, right)


def _unpacked(curve: list[bytes], images: list[int]) -> Iterator[np.ndarray]:
    for tasks, packed in enumerate(curve, 1):
        yield np.unpackbits(np.frombuffer(packed, np.uint8), count=sum(images[:tasks])).astype(bool)
