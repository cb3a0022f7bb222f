"""Final training: the chosen configs, on all training images, over seeds; the test set is opened here.

Every run lies in a folder of its own with its state: the same command goes on, and trains no complete run again.
"""

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from mlflow import MlflowClient
from mlflow.entities import Metric, Run, RunTag
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from inflora.config import ConfigError, RunConfig, config_hash, dump_config, load_config, method_of, override
from inflora.continual import TaskResult
from inflora.cuda import require_cuda
from inflora.data.stream import EvaluateOn
from inflora.data.tasks import in_numbers
from inflora.errors import one_line
from inflora.files import write_atomically
from inflora.metrics import Spread, accuracy_matrix, seen, spread
from inflora.runs import train_into
from inflora.setup import check, identity, search_stream
from inflora.state import MANIFEST, RunState, load_state
from inflora.storage import SharedFolder
from sweeps.engine.ledger.records import now_ms
from sweeps.engine.run.cluster import connect, gpus_of_a_run, trials_at_a_time
from sweeps.engine.run.nodes import check_nodes, faults_named
from sweeps.engine.run.reach import reachable_ray
from sweeps.engine.show import plots
from sweeps.engine.show.description import NOTE, plain, within_limit
from sweeps.engine.show.inputs import data_inputs
from sweeps.engine.show.mlflow_store import (
    experiment_id,
    log_accuracy,
    log_all,
    log_pictures,
    make_client,
    mlflow_metrics,
    params_of,
    source_tags,
    tagged_runs,
)
from sweeps.engine.show.output import check_can_write
from sweeps.engine.space.spec import Resources

REPORTED = {
    "acc/final": "accuracy over all test images after the last task",
    "acc/avg_incremental": "mean over tasks of the accuracy over all classes seen",
    "forgetting": "mean over old tasks of their best accuracy so far minus their last",
    "acc/new": "accuracy on the last task's images after learning it",
    "acc/task_aware": "final accuracy when the task of each image is known",
    "acc/task_identity": "how often the predicted class lies in the right task",
}


class FinalRun(NamedTuple):
    """One config trained with one seed, evaluated on test images, or on validation images while still choosing."""

    label: str
    seed: int
    config: RunConfig
    folder: Path
    evaluate_on: EvaluateOn = "test"


def load_by_label(paths: list[Path]) -> dict[str, RunConfig]:
    """Configs by their method's name, or by their file's where two share a method.

    Raises:
        ConfigError: Two configs would bear the same name, or one that MLflow does not take.
    """
    configs = [(path, in_numbers(load_config(path))) for path in paths]
    methods = [method_of(config) for _, config in configs]
    labels = [m if methods.count(m) == 1 else path.stem for m, (path, _) in zip(methods, configs, strict=True)]
    if len(set(labels)) < len(labels) or not all(re.fullmatch(r"[\w.-]+", label) for label in labels):
        raise ConfigError(f"configs of one method need different file names of letters, digits, . _ -, got {labels}")
    return {label: config for label, (_, config) in zip(labels, configs, strict=True)}


def plan(
    configs: Mapping[str, RunConfig],
    seeds: Sequence[int],
    out: Path,
    *,
    orders: Sequence[int | None] | None = None,
    evaluate_on: EvaluateOn = "test",
) -> list[FinalRun]:
    """Every config with every seed, and on every class order (None: each config's own).

    Validation images are drawn anew for every seed, by another split than the one trials were chosen by: the same ones
    for all configs, which are compared on them, but not the same luck in all of a config's runs.

    Raises:
        ConfigError: Settings that do not fit each other, before anything is trained.
    """
    runs = []
    for label, config in configs.items():
        check(config)
        for each in [config] if orders is None else [_in_order(config, order) for order in orders]:
            for seed in seeds:
                own: dict[str, int] = {"seed": seed}
                folder = out / f"{label}-{_identity(each)}" / f"seed-{seed}"
                if evaluate_on == "validation":
                    own["data.split_seed"] = (each.data.split_seed + 1 + seed) % 2**63
                    folder = folder.with_name(f"{folder.name}-split-{own['data.split_seed']}")
                runs.append(FinalRun(label, seed, override(each, own), folder, evaluate_on))
    return runs


def _identity(config: RunConfig) -> str:
    """A config's hash, whatever its seed."""
    return config_hash(config.model_copy(update={"seed": 0}))


def train_all(
    runs: Sequence[FinalRun], resources: Resources, say: Callable[[str], None], bucket: SharedFolder | None = None
) -> None:
    """Train what is not complete yet, as many runs at a time as the cluster has room for; a line for every task.

    Every node sees the runs' folders, or else a ``bucket``, from which they come here at their ends.

    Raises:
        ConfigError: Some runs have failed, after all others were trained: a folder holds a run with other settings, a
            machine's GPU cannot be used, machines or memory were lost too often.
    """
    # It only passes lines on, and must not take a run's CPU; here it is lost with this driver alone.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    news = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    task, address = ray.remote(_train_one), bucket.address if bucket else None

    def start(run: FinalRun) -> Any:
        gpus = 0 if run.config.device == "cpu" else resources.gpus_per_worker
        placed = task.options(num_cpus=resources.cpus_per_worker, num_gpus=gpus, max_retries=2)
        return placed.remote(run, resources, news, address)

    waiting = {start(run): run for run in runs}
    failed: list[str] = []
    while waiting:
        ended, _ = ray.wait(list(waiting), num_returns=1, timeout=1)
        for line in news.get_nowait_batch(news.qsize()):
            say(line)
        for done in ended:
            run = waiting.pop(done)
            try:
                final = ray.get(done)
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", error)
                failed.append(f"{_name(run)} in {run.folder}: {one_line(f'{type(cause).__name__}: {cause}', 300)}")
                say(failed[-1])
                continue
            if bucket:
                copy_home = partial(bucket.copy_to, kept_as(run), run.folder)
                bucket.when_there(copy_home)
            say(f"{_name(run)}: acc/final {100 * final:.1f} %  ({len(runs) - len(waiting)}/{len(runs)})")
    news.shutdown()
    if failed:
        told = "; ".join(failed)
        raise ConfigError(f"{len(failed)} of {len(runs)} runs have failed, the same command tries them again: {told}")


def _train_one(run: FinalRun, resources: Resources, news: Queue, bucket: str | None) -> float:
    def tell(result: TaskResult) -> None:
        done, seen_so_far = f"task {result.task + 1}/{result.state.tasks}", 100 * result.metrics["acc/seen"]
        news.put(f"{_name(run)} {done}  acc/seen {seen_so_far:.1f} %  {result.seconds:.0f} s")

    if resources.gpus and run.config.device != "cpu":
        with faults_named():
            require_cuda()
    torch.set_num_threads(resources.cpus_per_worker)
    if bucket:
        state = train_by_way_of(SharedFolder(bucket), run, tell)
    else:
        state = train_into(run.folder, run.config, run.evaluate_on, resume=True, on_task=tell)
    return _final_metrics(state)["acc/final"]


def train_by_way_of(bucket: SharedFolder, run: FinalRun, on_task: Callable[[TaskResult], None]) -> RunState:
    """Train in a folder of this machine alone, which begins and goes on as what the bucket keeps of the run."""
    with tempfile.TemporaryDirectory() as own:
        folder = Path(own) / "run"
        bucket.when_there(lambda: bucket.copy_to(kept_as(run), folder))
        sent = _files_below(folder)

        def keep() -> None:
            # As on a disk: the manifest of the state goes after the files that it names, what tells of the run after
            # its state; old files are deleted last.
            here = _files_below(folder)
            for file in sorted(here, key=lambda file: ("/" not in file, file.endswith(f"/{MANIFEST}"))):
                if sent.get(file) != here[file]:
                    bucket.write(f"{kept_as(run)}/{file}", (folder / file).read_bytes())
            for file in sent.keys() - here.keys():
                with contextlib.suppress(FileNotFoundError):  # it was, and the answer was lost
                    bucket.delete(f"{kept_as(run)}/{file}")
            sent.clear()
            sent.update(here)

        def tell(result: TaskResult) -> None:
            bucket.when_there(keep)
            on_task(result)

        state = train_into(folder, run.config, run.evaluate_on, resume=True, on_task=tell)
        bucket.when_there(keep)  # the result, which comes after the last task
        return state


def _files_below(folder: Path) -> dict[str, int]:
    """The paths of a folder's files in it, and when they were written."""
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def kept_as(run: FinalRun) -> str:
    """The name of a run's folder in a bucket."""
    return "/".join(run.folder.parts[-3:])


def _in_order(config: RunConfig, order: int | None) -> RunConfig:
    """The config with another class order in the place of its own; None keeps the one that no seed has drawn."""
    named = {} if order is None else {"data.order": None}
    return override(config, {"data.order_seed": order} | named)


def _name(run: FinalRun) -> str:
    order = run.config.data.order or run.config.data.order_seed
    return f"{run.label} seed {run.seed} order {'natural' if order is None else order}"


class FinalTraining(NamedTuple):
    """Over which seeds and class orders (None: each config's own) configs are trained, and where.

    ``bucket`` keeps the runs while they are trained, where there is no folder that all nodes see. With ``finds_gpus``
    every run asks for a GPU where the cluster has some.
    """

    seeds: list[int]
    orders: list[int | None] | None
    resources: Resources
    address: str | None
    bucket: str | None = None
    finds_gpus: bool = False

    def train(
        self, configs: Mapping[str, RunConfig], folder: Path, evaluate_on: EvaluateOn, say: Callable[[str], None]
    ) -> list[FinalRun]:
        """The runs of these configs, trained unless they are there already."""
        planned = plan(configs, self.seeds, folder, orders=self.orders, evaluate_on=evaluate_on)
        reachable_ray(self.address)
        check_can_write(folder)
        connect(self.address, say)
        resources = self.resources
        if self.finds_gpus and any(run.config.device != "cpu" for run in planned) and gpus_of_a_run(self.address):
            resources = resources.model_copy(update={"gpus_per_worker": 1})
            say("Ray: every run asks for a GPU (--gpus)")
        trials_at_a_time(resources, "inline", say)
        check_nodes(SharedFolder(self.bucket or str(folder)))
        runs = [run._replace(config=resources.on_device(run.config)) for run in planned]
        train_all(runs, resources, say, SharedFolder(self.bucket) if self.bucket else None)
        return runs


def summarise(runs: Sequence[FinalRun]) -> dict[str, dict[str, Spread]]:
    """Label -> metric -> mean and spread over its seeds, read from the finished runs."""
    by_label: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        by_label.setdefault(run.label, []).append(_final_metrics(load_state(run.folder / "state")))
    return {
        label: {name: spread([metrics[name] for metrics in results]) for name in REPORTED}
        for label, results in by_label.items()
    }


def _final_metrics(state: RunState) -> dict[str, float]:
    return state.metrics(state.tasks)


def write_report(runs: Sequence[FinalRun], summary: Mapping[str, Mapping[str, Spread]], out: Path) -> Path:
    """The results side by side, as Markdown and JSON, with every metric's definition and every config's origin."""
    header = "| method | " + " | ".join(REPORTED) + " | seeds |"
    lines = ["# Final results, on test images", "", header, "|---" * (len(REPORTED) + 2) + "|"]
    for label, metrics in summary.items():
        cells = [_in_percent(metrics[name]) for name in REPORTED]
        seeds = ", ".join(str(seed) for seed in dict.fromkeys(run.seed for run in runs if run.label == label))
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {seeds} |")
    lines += [
        "",
        "In percent: mean ± sample standard deviation over the runs (seeds, and class orders where several); a single "
        "run has no spread.",
        "",
    ]
    lines += [f"- `{name}`: {meaning}" for name, meaning in REPORTED.items()]
    lines += ["", "A single task (joint training) has no forgetting, and its task is always known.", ""]
    write_atomically(out / "report.md", "\n".join(lines).encode())
    configs = {run.label: run.config.model_dump(mode="json", exclude={"seed"}) for run in runs}
    values = {label: {name: s._asdict() for name, s in metrics.items()} for label, metrics in summary.items()}
    write_atomically(out / "report.json", json.dumps({"summary": values, "configs": configs}, indent=2).encode())
    _curves(runs).savefig(out / "curves.png", dpi=120)
    return out / "report.md"


def _in_percent(spread: Spread) -> str:
    return f"{100 * spread.mean:.1f}" + (f" ± {100 * spread.std:.1f}" if spread.std is not None else "")


def _curves(runs: Sequence[FinalRun]) -> Any:
    curves: dict[str, list[list[float]]] = {}
    for run in runs:
        state = load_state(run.folder / "state")
        if state.tasks > 1:
            curves.setdefault(run.label, []).append([seen(evaluation) for evaluation in state.evaluations])
    return plots.accuracy_curves(curves, "test accuracy on all classes seen (%)")


def log_final(runs: Sequence[FinalRun], summary: Mapping[str, Mapping[str, Spread]], out: Path, uri: str) -> str:
    """Show the finished runs in MLflow: a parent with mean and spread, a child with the model for every run.

    Runs that are there already, from an earlier call, are left as they are. Returns the parent's run id.
    """
    client = make_client(uri)
    experiment = experiment_id(client, runs[0].config.data.dataset, "acc/final")
    compared = sorted({f"{run.label}-{_identity(run.config)}" for run in runs})
    name = f"final-{hashlib.sha256(' '.join(compared).encode()).hexdigest()[:16]}"
    there = {run.data.tags["inflora.run"]: run for run in tagged_runs(client, experiment, "inflora.final", name)}
    parent = there.get("parent")
    if parent is None:
        tags = {"inflora.final": name, "inflora.run": "parent", **source_tags("sweeps final")}
        parent = client.create_run(experiment, tags=tags, run_name="final " + " ".join(compared))
    for run in runs:
        key = f"{run.label}-{config_hash(run.config)}"
        child = there.get(key)
        if child is None:
            child = _create_run(
                client, experiment, parent.info.run_id, run, {"inflora.final": name, "inflora.run": key}
            )
        if child.info.status != "FINISHED":
            _log_run(client, child.info.run_id, run, parent.info.run_id)
    metrics = [
        Metric(f"{label}/{metric}_{kind}", value, now_ms(), 0)
        for label, spreads in summary.items()
        for metric, s in spreads.items()
        for kind, value in s._asdict().items()
        if value is not None
    ]
    note = RunTag(NOTE, within_limit((out / "report.md").read_text()))
    client.log_batch(parent.info.run_id, metrics=metrics, tags=[note])
    for file in ("report.md", "report.json", "curves.png"):
        client.log_artifact(parent.info.run_id, str(out / file))
    client.set_terminated(parent.info.run_id, "FINISHED")
    return parent.info.run_id


def _create_run(client: MlflowClient, experiment: str, parent: str, run: FinalRun, own_tags: Mapping[str, str]) -> Run:
    tags = {**identity(run.config), **own_tags, "mlflow.parentRunId": parent, "inflora.evaluated_on": run.evaluate_on}
    tags |= source_tags("sweeps final")
    return client.create_run(experiment, tags=tags, run_name=f"final-{run.label}-seed-{run.seed}")


def _log_run(client: MlflowClient, run_id: str, run: FinalRun, parent: str) -> None:
    """Everything about a finished run; doing it again after a broken connection changes nothing."""
    inputs = [each.entity() for each in data_inputs(search_stream(run.config), run.config, run.evaluate_on)]
    for each in (run_id, parent):
        client.log_inputs(each, datasets=inputs)
    state = load_state(run.folder / "state")
    finished_ms = int((run.folder / "result.json").stat().st_mtime * 1000)
    matrix, metrics = accuracy_matrix(state.evaluations), [state.metrics(done + 1) for done in range(state.tasks)]
    logged = [
        metric
        for done, (row, known) in enumerate(zip(matrix, metrics, strict=True), 1)
        for metric in mlflow_metrics(done, known, row, finished_ms)
    ]
    note = f"{_name(run)}: acc/final {metrics[-1]['acc/final']:.4f} on {run.evaluate_on} images"
    log_all(client, run_id, logged, params_of(run.config), [RunTag(NOTE, plain(note))])
    log_accuracy(client, run_id, matrix, [known["acc/seen"] for known in metrics])
    log_pictures(client, run_id, matrix, metrics)
    client.log_text(run_id, dump_config(run.config), "model/config.yaml")
    for part in ("state", "adapters"):
        if (run.folder / part).exists():  # not every method leaves adapters
            client.log_artifacts(run_id, str(run.folder / part), f"model/{part}")
    client.set_terminated(run_id, "FINISHED")
