"""A preset again, over seeds, in one folder that shows what was done; typed again it goes on after any stop.

README.md      the page
summary.json   all that the page says, and more: every seed's metrics, accuracy matrix, hashes and versions
config.yaml    the settings, as ``inflora train`` takes them
log.txt        a line for every task, with its time
runs/          every seed's run with its model: large; whoever checks the rest does not need it
"""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from inflora.config import ConfigError, RunConfig, config_hash, dump_config, override
from inflora.continual import TaskResult
from inflora.cuda import pick_device
from inflora.data import DATASETS, ensure_store
from inflora.data.store import read_manifest
from inflora.files import source_hash, why_unwritable, write_atomically
from inflora.presets import find_preset
from inflora.reproduction import SUMMARY, Reproduction, Run, command, read_reproduction, write
from inflora.runs import Result, train_into
from inflora.setup import check
from inflora.training import EpochDone

_PLACES = ("data.root", "backbone.weights")
"""Settings that name a place of this machine, which is nobody's business; they are no part of a run's hash."""


def why_incomparable(preset: str, config: RunConfig, evaluate_on: str) -> str | None:
    """The reason why a run's numbers are not to be held against a preset's published ones, if there is one."""
    if config.backbone.weights:
        return "the backbone's weights are a file of one's own"
    if evaluate_on != "test" or _whatever_seed(config) != _whatever_seed(find_preset(preset).config):
        return "other settings than the seed differ, or the images judged on"
    dataset = config.data.dataset
    whole = read_manifest(ensure_store(dataset, config.data.root)).whole
    if not whole and not (dataset in DATASETS and DATASETS[dataset].needs is None):
        return f"{dataset} here is not the whole dataset"
    return None


def _whatever_seed(config: RunConfig) -> str:
    return config_hash(override(config, {"seed": 0}))


def reproduce(
    preset: str,
    changes: Mapping[str, Any],
    seeds: Sequence[int],
    out: Path,
    *,
    say: Callable[[str], None] = print,
    on_epoch: Callable[[EpochDone], None] = lambda _: None,
) -> Reproduction:
    """Train a preset with every seed that is not done yet, and write down what came of all that are.

    Raises:
        ConfigError: An unknown preset, settings that do not fit, data that are not there, or a folder of another one.
    """
    if "seed" in changes:
        raise ConfigError(f"seeds are given by --seeds, got seed={changes['seed']}")
    config = override(find_preset(preset).config, changes)
    if problem := why_unwritable(out):
        raise ConfigError(f"cannot write into {str(out)[:100]}: {problem}")
    known = {run.seed: run for run in _done_before(preset, config, out)}
    check(config)
    incomparable = why_incomparable(preset, config, "test")
    out.mkdir(parents=True, exist_ok=True)
    tell = _telling(out / "log.txt", say)
    tell(f"{command(preset, _to_tell(changes), seeds)}  ({_machine(config)})")
    for seed in seeds:
        if seed in known:
            tell(f"seed {seed}: done before")
            continue
        known[seed] = _run(override(config, {"seed": seed}), out / "runs" / f"seed-{seed}", tell, on_epoch)
        found = Reproduction(
            preset=preset,
            changes=_to_tell(changes),
            config=override(config, dict.fromkeys(_PLACES)),
            published=find_preset(preset).published,
            incomparable=incomparable,
            runs=[known[done] for done in sorted(known)],
        )
        write_atomically(out / "config.yaml", dump_config(found.config).encode())
        write(found, out)
    found = read_reproduction(out)
    write(found, out)  # a stop may have come between the numbers and their page
    return found


def _done_before(preset: str, config: RunConfig, out: Path) -> list[Run]:
    """The runs of an earlier call in the same folder."""
    if not (out / SUMMARY).exists():
        return []
    found = read_reproduction(out)
    if found.preset != preset or _whatever_seed(found.config) != _whatever_seed(config):
        raise ConfigError(f"{out} holds {found.preset} with other settings; choose another folder with --out")
    return found.runs


def _run(config: RunConfig, folder: Path, tell: Callable[[str], None], on_epoch: Callable[[EpochDone], None]) -> Run:
    """Train one seed, or go on with it."""

    def on_task(result: TaskResult) -> None:
        done, seen = f"{result.task + 1}/{result.state.tasks}", 100 * result.metrics["acc/seen"]
        tell(f"seed {config.seed} task {done}: all seen {seen:.2f} %, {result.seconds:.1f} s")

    train_into(folder, config, "test", resume=True, on_task=on_task, on_epoch=on_epoch)
    result = Result.model_validate_json((folder / "result.json").read_bytes())
    return Run(
        seed=config.seed,
        # Those of every layer's memory are many: they are in the run's own result.json.
        metrics={name: value for name, value in result.metrics.items() if not name.startswith(("memory/", "drift/"))},
        accuracy_matrix=result.accuracy_matrix,
        identity=result.identity | {"machine": _machine(config), "source": source_hash("inflora")},
    )


def _machine(config: RunConfig) -> str:
    """The processor that trains, in words."""
    device = pick_device(config.device)
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def _to_tell(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings to be told."""
    return {path: value for path, value in changes.items() if path not in _PLACES}


def _telling(log: Path, say: Callable[[str], None]) -> Callable[[str], None]:
    """Say a line, and keep it with its time."""

    def tell(line: str) -> None:
        say(line)
        with log.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {line}\n")

    return tell


def how_to_send(folder: Path) -> str:
    """The command that packs the small files of a reproduction, without its runs."""
    name = folder.absolute().name
    return f"tar czf {name}.tar.gz --exclude={name}/runs -C {folder.absolute().parent} {name}"
