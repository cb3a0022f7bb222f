"""Every adapter with every classifier on three streams of tasks: tuned alike, tested alike.

python benchmarks/pairs.py                  writes its part of docs/results.md; what is done is not done again
python benchmarks/pairs.py --only digits --adapters none inflora    a part of it

The same for all pairs: an adapter is trained with so many settings, its defaults and others that are drawn alike for
all adapters, and every classifier is fitted, with at most so many settings of its own, to the features of the same
trainings (one_training.py). The best on validation images, with the first class order and seed, is trained on all
training images with every seed and class order, and tested. Then the best of each adapter's trainings once more, with
classifiers that are fitted to augmented looks at its images as well.
"""

import argparse
import json
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from one_training import shown_by
from pairs_report import TITLE, Pair, Tuned, read_figures, report, viewed, write_figures, write_section
from scipy.stats import qmc
from streams import STREAMS, prepare

from inflora.config import ConfigError, RunConfig, config_hash, override
from inflora.data.stream import EvaluateOn
from inflora.files import write_atomically

# What is compared.

COMPARED = ("digits", "strokes", "woven")
ORDERS, SEEDS = (1993, 1, 2), (0, 1, 2)
TRAININGS = 17
DRIFTS = (None, 0.01, 0.1)
CLASSIFIERS: dict[str, list[dict[str, Any]]] = {
    "linear": [{}],
    "aligned": [{"temperature": 0.1, "steps": steps, "drift": drift} for steps in (50, 500) for drift in DRIFTS],
    "ncm": [{"drift": drift} for drift in (*DRIFTS, 1e-3, 0.03, 1.0)],
    "lda": [{"shrinkage": shrinkage, "drift": drift} for shrinkage in (None, 0.1) for drift in DRIFTS],
    "qda": [{"pooling": pooling, "drift": drift} for pooling in (0.5, 0.9) for drift in DRIFTS],
    "ranpac": [{"features": features, "drift": drift} for features in (500, 1000) for drift in DRIFTS],
}
"""The settings of each classifier that are tried: as many for all that have any."""
VIEWS = 8
FITTED_TO_VIEWS: dict[str, list[dict[str, Any]]] = {
    "aligned": [{"temperature": 0.1, "steps": 500, "drift": drift} for drift in (None, 0.1)],
    "ncm": [{"drift": drift} for drift in (None, 0.1)],
    "lda": [{"drift": drift} for drift in (None, 0.1)],
    "qda": [{"pooling": 0.9, "drift": drift} for drift in (None, 0.1)],
    "ranpac": [{"features": features, "drift": None} for features in (1000, 2000)],
}
"""And of those that are fitted to ``VIEWS`` augmented looks at each image."""
PROMPTS = ("l2p", "dualprompt", "codaprompt")
ADAPTERS = ("joint", "none", "lora", "inflora", "olora", "sdlora", "e2lora", *PROMPTS)


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
        changes |= {
            "inflora": {"adapter.energy": 1 - log(own, 1e-4, 0.05), "adapter.train_A": one_of(train_A, False, True)},
            "olora": {"adapter.penalty": log(own, 0.01, 10)},
            "sdlora": {"adapter.magnitude_lr": log(own, 1e-4, 0.03)},
            "l2p": {"adapter.key_lr": log(own, 3e-4, 0.1)},
            "dualprompt": {"adapter.key_lr": log(own, 3e-4, 0.1)},
            "codaprompt": {"adapter.prompt_lr": log(own, 3e-4, 0.1)},
        }.get(adapter, {})
        tried.append(changes)
    return tried


def choices(views: int) -> dict[str, dict[str, Any]]:
    """A label for every classifier with its settings, fitted to so many augmented looks."""
    labelled = {}
    for name, several in (FITTED_TO_VIEWS if views else CLASSIFIERS).items():
        for settings in several:
            said = [name, *(f"{key}={value}" for key, value in settings.items())]
            labelled[" ".join(said)] = {"name": name} | settings | ({"views": views} if views else {})
    return labelled


# What is done once.


class Training(NamedTuple):
    """One training of an adapter: what is to be done once.

    Classifiers are fitted to so many ``views``: those of the ``labels``, or all of ``choices``.
    """

    stream: str
    adapter: str
    changes: tuple[tuple[str, Any], ...]
    order: int
    seed: int
    evaluate_on: EvaluateOn
    views: int = 0
    labels: tuple[str, ...] = ()

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
    """What the training shows, or what it did when it was done before; empty of classifiers where it went astray."""
    config = training.config(folder / "data")
    tried = choices(training.views).items()
    wanted = {label: each for label, each in tried if not training.labels or label in training.labels}
    labelled = {label: each for label, each in wanted.items() if not (config.data.joint and each["name"] == "aligned")}
    name = f"{training.stream}-{training.adapter}-{training.order}-{training.seed}-{config_hash(config)}"
    file = folder / f"{name}-{training.evaluate_on}{'-views' if training.views else ''}.json"
    if not file.exists():
        torch.set_num_threads(1)
        try:
            shown = shown_by(config, training.evaluate_on, labelled)
        except (FloatingPointError, ConfigError) as error:
            shown = {"": {"error": str(error)}}
        write_atomically(file, json.dumps(shown).encode())
    return dict(json.loads(file.read_text()))


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
                f"{number}/{len(waiting)} {training.stream} {training.adapter} {training.evaluate_on}: {best:.3f}",
                flush=True,
            )
    return known


Shown = dict[Training, dict[str, Any]]


def best_of(trainings: list[Training], shown: Shown, name: str = "") -> tuple[Training, str] | None:
    """The best training and classifier, any or that of a ``name``, by accuracy on validation images."""
    candidates = [
        (metrics["acc/final"], metrics["acc/avg_incremental"], training, label)
        for training in trainings
        for label, metrics in shown[training].items()
        if "acc/final" in metrics and name in ("", label.split(" ")[0])
    ]
    if not candidates:
        return None
    *_, training, label = max(candidates, key=lambda found: found[:2])
    return training, label


def tested(tried: Mapping[str, list[Training]], on_validation: Shown, folder: Path, jobs: int) -> dict[Pair, Tuned]:
    """Every adapter's best training with each classifier, tested."""
    chosen = {
        Pair(adapter, name): best
        for adapter, several in tried.items()
        for name in CLASSIFIERS
        if (best := best_of(several, on_validation, name))
    }
    finals = {
        pair: [training._replace(order=order, seed=seed, evaluate_on="test") for order in ORDERS for seed in SEEDS]
        for pair, (training, _) in chosen.items()
    }
    on_test = done([training for several in finals.values() for training in several], folder, jobs)
    return {
        pair: Tuned(
            dict(training.changes),
            label,
            on_validation[training][label]["acc/final"],
            [on_test[final][label] | {"share": share(on_test[final], label)} for final in finals[pair]],
        )
        for pair, (training, label) in chosen.items()
    }


def compared(stream: str, adapters: list[str], folder: Path, jobs: int) -> tuple[dict[Pair, Tuned], dict[Pair, Tuned]]:
    """How every pair does on a stream, and how with views the classifiers do on each adapter's best training."""
    tried = {
        adapter: [
            Training(stream, adapter, frozen(changes), ORDERS[0], SEEDS[0], "validation")
            for changes in settings_tried(adapter)
        ]
        for adapter in adapters
    }
    shown = done([training for several in tried.values() for training in several], folder, jobs)
    best = {adapter: best_of(several, shown) for adapter, several in tried.items()}
    with_views = {adapter: [found[0]._replace(views=VIEWS)] for adapter, found in best.items() if found}
    shown |= done([training for several in with_views.values() for training in several], folder, jobs)
    return tested(tried, shown, folder, jobs), tested(with_views, shown, folder, jobs)


def share(shown: Mapping[str, Mapping[str, float]], label: str) -> float:
    """The classifier's seconds as a share of its training's."""
    if label == "linear":
        return 0.0
    passes = 1 if label.endswith("drift=None") else 2
    return (shown[label]["seconds"] + passes * shown[""]["pass"]) / shown[""]["training"]


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
        found = compared(name, arguments.adapters, arguments.folder, arguments.jobs)
        for key, pairs in zip((name, viewed(name)), found, strict=True):
            known[key] = in_order({**known.get(key, {}), **pairs})
        write_figures(known, arguments.figures)
        write_section(arguments.out, TITLE, report(known))


if __name__ == "__main__":
    main()
