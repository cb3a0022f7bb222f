"""Every adapter with every classifier on three streams of tasks: tuned alike, tested alike.

python benchmarks/pairs.py                  writes its part of docs/results.md; what is done is not done again
python benchmarks/pairs.py --only digits --adapters none inflora    a part of it

The same for all adapters: each is trained with as many settings, its defaults and others that are drawn alike for all.
Validation images, with the first class order and seed, choose two of its trainings: the best with linear heads, and the
best with any classifier in closed form (fitted to the features of the same trainings: one_training.py). On the latter
they also choose the settings of every fitted classifier, with or without drift compensation and augmented looks. Both
are then trained on all training images with every seed and class order, and tested.
"""

import argparse
import ast
import json
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from frozen_features import FrozenFeatures
from one_training import shown_by
from pairs_report import ADAPTERS, METRICS, TITLE, Pair, Tuned, read_figures, report, write_figures, write_section
from scipy.stats import qmc
from streams import STREAMS, prepare

from inflora.config import ConfigError, RunConfig, config_hash, override
from inflora.data.stream import EvaluateOn
from inflora.files import write_atomically

# What is compared.

COMPARED = ("woven", "digits", "strokes")
ORDERS, SEEDS = (1993, 1, 2), (0, 1, 2)
TRAININGS = 12
CLASSIFIERS = {
    "linear": "linear",
    "aligned": "aligned temperature=0.1 steps=500",
    "ncm": "ncm",
    "lda": "lda",
    "qda": "qda pooling=0.9",
    "ranpac": "ranpac features=1000",
}
"""Each classifier with settings that have done well; ``drift`` and ``views`` are added to them."""
CLOSED_FORM = ("ncm", "lda", "qda", "ranpac")
DRIFTS, VIEWS = (None, 0.1), (0, 8)
PROMPTS = ("l2p", "dualprompt", "codaprompt")


def settings_tried(adapter: str) -> list[dict[str, Any]]:
    """The settings of an adapter that are tried: its defaults, then points of one Latin hypercube for all adapters."""

    def log(point: float, low: float, high: float) -> float:
        return float(low * (high / low) ** point)

    def one_of(point: float, *values: Any) -> Any:
        return values[int(point * len(values))]

    points = qmc.LatinHypercube(7, optimization="random-cd", rng=0).random(TRAININGS - 1)
    tried: list[dict[str, Any]] = [{"optim.lr": 1e-3}]
    for lr, features, tasks, rank, merge, own, train_A in points:
        changes = {"optim.lr": log(lr, 5e-4, 2e-2)}
        if adapter != "none":
            changes["adapter.features"] = one_of(features, "adapted", "both")
        if adapter not in ("none", "joint"):
            changes["adapter.adapt_tasks"] = one_of(tasks, None, None, 1)
        if adapter not in ("none", "e2lora", *PROMPTS):
            changes["adapter.rank"] = int(log(rank, 8, 64))
        if adapter not in ("none", *PROMPTS):
            changes["adapter.merge"] = one_of(merge, 1.0, 0.5, 0.25, 0.1)
            changes["adapter.first_merge"] = 1.0
        # What is balanced is merged whole: the balance says how much of it, direction by direction.
        balance = one_of(2 * train_A % 1, {}, {"adapter.balance": 1.0, "adapter.merge": 1.0})
        changes |= {
            "inflora": {
                "adapter.energy": 1 - log(own, 1e-4, 0.05),
                "adapter.train_A": one_of(train_A, False, True),
                **balance,
            },
            "olora": {"adapter.penalty": log(own, 0.01, 10)},
            "sdlora": {"adapter.magnitude_lr": log(own, 1e-4, 0.03)},
            "l2p": {"adapter.key_lr": log(own, 3e-4, 0.1)},
            "dualprompt": {"adapter.key_lr": log(own, 3e-4, 0.1)},
            "codaprompt": {"adapter.prompt_lr": log(own, 3e-4, 0.1)},
        }.get(adapter, {})
        tried.append(changes)
    return tried


def variants(name: str, drifts: tuple[float | None, ...], several_views: tuple[int, ...]) -> list[str]:
    """The labels of a classifier with every combination of these settings; ``linear`` has none."""
    if name == "linear":
        return [CLASSIFIERS[name]]
    return [f"{CLASSIFIERS[name]} drift={drift} views={views}" for views in several_views for drift in drifts]


def settings_of(label: str) -> dict[str, Any]:
    """The settings of a classifier that a label says: its name, and ``key=value`` for others."""
    name, *others = label.split(" ")
    pairs = (each.split("=") for each in others)
    return {"name": name} | {key: ast.literal_eval(value) for key, value in pairs}


# What is done once.


class Training(NamedTuple):
    """One training of an adapter, and the labels of the classifiers that are fitted to its features."""

    stream: str
    adapter: str
    changes: tuple[tuple[str, Any], ...]
    order: int
    seed: int
    evaluate_on: EvaluateOn
    labels: tuple[str, ...]

    def memory(self, folder: Path) -> FrozenFeatures:
        """What is known of the batches that it shares with others of its stream, class order and seed."""
        together = "-joint" if self.adapter == "joint" else ""
        return FrozenFeatures(folder / f"frozen/{self.stream}{together}-{self.order}-{self.seed}-{self.evaluate_on}")

    @property
    def drifts(self) -> tuple[float | None, ...]:
        """What is worth trying as drift compensation: nothing where no task moves old features."""
        moves = self.adapter not in ("none", "joint") and dict(self.changes).get("adapter.adapt_tasks") != 1
        return DRIFTS if moves else (None,)

    def with_variants(self, names: tuple[str, ...], several_views: tuple[int, ...]) -> "Training":
        """The same with all that is tried of these classifiers; alignment needs a second task."""
        able = [name for name in names if (self.adapter, name) != ("joint", "aligned")]
        return self._replace(labels=tuple(v for name in able for v in variants(name, self.drifts, several_views)))

    def config(self, root: Path) -> RunConfig:
        """Its settings; "joint" learns all tasks as one with plain LoRA."""
        stream, joint = STREAMS[self.stream], self.adapter == "joint"
        train_on = "train+validation" if self.evaluate_on == "test" else "train"
        data = stream.data.model_copy(
            update={"order_seed": self.order, "root": str(root), "joint": joint, "train_on": train_on}
        )
        base = RunConfig(data=data, optim=stream.optim, seed=self.seed, device="cpu")
        return override(base, {"adapter": "lora" if joint else self.adapter} | dict(self.changes))


def remembered(training: Training, folder: Path) -> dict[str, Any]:
    """What the training shows of its classifiers, or did when it was done before; nothing of any where it went astray.

    Its file keeps what each classifier has shown; those that it lacks are fitted in a training of their own.
    """
    config = training.config(folder / "data")
    name = f"{training.stream}-{training.adapter}-{training.order}-{training.seed}-{config_hash(config)}"
    file = folder / f"{name}-{training.evaluate_on}.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    missing = {label: settings_of(label) for label in training.labels if label not in known}
    if missing and "error" not in known.get("", {}):
        torch.set_num_threads(1)
        try:
            known |= shown_by(config, training.evaluate_on, missing, training.memory(folder))
        except (FloatingPointError, ConfigError) as error:
            known[""] = {"error": str(error)}
        write_atomically(file, json.dumps(known).encode())
    wanted = {label: known[label] for label in training.labels if label in known}
    return {} if "error" in known[""] else {"": known[""]} | wanted


def frozen(changes: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Settings as a value that can be a key."""
    return tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in changes.items())


def done(trainings: list[Training], folder: Path, jobs: int) -> dict[Training, dict[str, Any]]:
    """Do all of them, so many at a time; a line for each."""
    known: dict[Training, dict[str, Any]] = {}
    with ProcessPoolExecutor(jobs) as pool:
        waiting = {pool.submit(remembered, training, folder): training for training in dict.fromkeys(trainings)}
        for number, future in enumerate(as_completed(waiting), 1):
            training = waiting[future]
            known[training] = future.result()
            best = max((v["acc/final"] for k, v in known[training].items() if k), default=float("nan"))
            print(
                f"{time.strftime('%H:%M:%S')} {training.stream} {training.adapter} {training.evaluate_on} "
                f"{number}/{len(waiting)}: {best:.3f}",
                flush=True,
            )
    return known


Shown = dict[Training, dict[str, Any]]


def best_of(trainings: list[Training], shown: Shown, names: tuple[str, ...]) -> tuple[Training, str]:
    """The best training and classifier of these ``names``, by accuracy on validation images; the first of equals."""
    candidates = [
        (metrics["acc/final"], metrics["acc/avg_incremental"], training, label)
        for training in trainings
        for label, metrics in shown[training].items()
        if label.split(" ")[0] in names
    ]
    *_, training, label = max(candidates, key=lambda found: found[:2])
    return training, label


def chosen(stream: str, adapter: str, folder: Path, jobs: int) -> Iterator[tuple[Pair, Training, str, float]]:
    """Every classifier's pair with the adapter: its training, its settings, and what it has on validation images."""
    first = [
        Training(stream, adapter, frozen(changes), ORDERS[0], SEEDS[0], "validation", ()).with_variants(
            ("linear", *CLOSED_FORM), VIEWS[:1]
        )
        for changes in settings_tried(adapter)
    ]
    shown = done(first, folder, jobs)
    heads, _ = best_of(first, shown, ("linear",))
    closed, _ = best_of(first, shown, CLOSED_FORM)
    closer = closed.with_variants(tuple(CLASSIFIERS), VIEWS)
    shown |= done([closer], folder, jobs)
    for name in CLASSIFIERS:
        if (adapter, name) != ("joint", "aligned"):
            training, label = best_of([heads if name == "linear" else closer], shown, (name,))
            yield Pair(adapter, name), training, label, shown[training][label]["acc/final"]


def compared(stream: str, adapter: str, folder: Path, jobs: int) -> dict[Pair, Tuned]:
    """How the adapter does on a stream with every classifier: chosen on validation images, and tested."""
    pairs = list(chosen(stream, adapter, folder, jobs))
    labels: dict[tuple[tuple[str, Any], ...], list[str]] = {}
    for _, training, label, _ in pairs:
        labels.setdefault(training.changes, []).append(label)
    finals = {
        changes: [
            Training(stream, adapter, changes, order, seed, "test", tuple(several))
            for order in ORDERS
            for seed in SEEDS
        ]
        for changes, several in labels.items()
    }
    shown = done([final for several in finals.values() for final in several], folder, jobs)
    return {
        pair: Tuned(
            dict(training.changes),
            label,
            validation,
            [with_share(shown[final], label) for final in finals[training.changes]],
        )
        for pair, training, label, validation in pairs
        if all(shown[final] for final in finals[training.changes])
    }


def with_share(shown: Mapping[str, Mapping[str, float]], label: str) -> dict[str, float]:
    """The metrics that are reported of a classifier, and its seconds as a share of its training's."""
    metrics = {name: shown[label][name] for name in METRICS}
    share = shown[label]["seconds"] / shown[""]["seconds"]
    return {name: round(value, 6) for name, value in (metrics | {"share": share}).items()}


def in_order(pairs: dict[Pair, Tuned]) -> dict[Pair, Tuned]:
    """The pairs, adapter by adapter."""
    return {pair: pairs[pair] for adapter in ADAPTERS for pair in pairs if pair.adapter == adapter}


def main() -> None:
    """Do what is not done yet, keep the figures, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(COMPARED), choices=COMPARED)
    parser.add_argument("--adapters", nargs="*", default=list(ADAPTERS), choices=ADAPTERS)
    parser.add_argument("--folder", type=Path, default=Path("results/pairs"), help="a file for each training")
    parser.add_argument("--figures", type=Path, default=Path("benchmarks/pairs.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at a time")
    arguments = parser.parse_args()
    known = read_figures(arguments.figures)
    for name in arguments.only:
        prepare(name, arguments.folder / "data")
        for adapter in arguments.adapters:
            found = compared(name, adapter, arguments.folder, arguments.jobs)
            known[name] = in_order({**known.get(name, {}), **found})
            write_figures(known, arguments.figures)
            write_section(arguments.out, TITLE, report(known))


if __name__ == "__main__":
    main()
