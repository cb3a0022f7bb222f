"""How soon a sweep of the digits finds a good setting: early stopping against plain TPE and random search.

python benchmarks/search.py                 half an hour on one core; tables, and benchmarks/search.json
python benchmarks/search.py --seeds 0       one seed; what is done is not done again, another process may do the rest
python benchmarks/search.py --ray           through Ray Tune, which adds its start and MLflow to the time on the clock

Every arm is a whole sweep, one trial at a time, with the engine's own ledger, searcher, scheduler and trial: the space
and base of sweeps/digits.py, the paper's setting first, then the sampler's; only the epochs of a task are fewer
(--epochs). All trials train with the same seed and images, so that a setting has one score; the sampler's seed is what
differs between sweeps, and the arms of a seed begin with the same random settings. The score to reach is a share of the
best that any of the sweeps found.

What it takes to reach it, stopped trials included, is counted in tasks learnt, whatever else the machine does, in
seconds of training (of the processor; with --ray, of the clock), and on the clock from the first trial's start to the
end of the trial that reaches it. Over seeds it is the expected running time of black-box optimisation (Hansen et al.,
2009): what all sweeps took, those that never reach it to their end, by the number of those that do.

A few sweeps say little about early stopping by itself. The trials of random search are known to their end, so they are
also replayed in many orders under every rule, which stops what it would have stopped.
"""

import contextlib
import json
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import typer
from ray.tune.schedulers import TrialScheduler
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from inflora.config import override
from inflora.files import write_atomically
from inflora.state import RunState
from sweeps.cli import parse_seeds, quiet_libraries
from sweeps.digits import published as digits
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.records import Outcome, TaskReport, TrialRecord, best_record, describe
from sweeps.engine.run.cluster import Cluster
from sweeps.engine.run.runner import locked, run_sweep, say_to_stdout
from sweeps.engine.run.trial import learn
from sweeps.engine.run.tune import StudyScheduler, StudySearcher
from sweeps.engine.show.mlflow_store import default_tracking_uri
from sweeps.engine.space.early_stopping import Rungs
from sweeps.engine.space.spec import Sweep

DEFAULT = "tpe + asha"
ARMS: dict[str, dict[str, Any]] = {
    "random": {"sampler": "random", "early_stopping": "none"},
    "tpe": {"sampler": "tpe", "early_stopping": "none"},
    DEFAULT: {},
}
"""What each arm changes of the product's defaults."""
RULES: dict[str, dict[str, Any]] = {
    "none": {"early_stopping": "none"},
    "asha (the default)": {},
    "asha, grace_tasks=1": {"grace_tasks": 1},
    "asha, grace_tasks=3": {"grace_tasks": 3},
    "asha, reduction=3": {"reduction": 3},
    "median": {"early_stopping": "median"},
    "hyperband": {"early_stopping": "hyperband"},
}
"""Rules of early stopping that are replayed on the trials of random search."""
ORDERS = 300
SHARES = (0.95, 0.98, 0.99)


class Cost(NamedTuple):
    """What trials took: tasks learnt, seconds of training, seconds on the clock."""

    tasks: float
    seconds: float
    wall_s: float


NEVER = Cost(math.inf, math.inf, math.inf)


def make_sweep(arm: str, seed: int, trials: int, epochs: int) -> Sweep:
    """One arm's sweep with one sampler seed."""
    changes = {
        "name": f"{arm.replace(' + ', '-')}-{seed}",
        "base": override(digits.base, {"optim.epochs": epochs, "device": "cpu"}),
        "trials": trials,
        "sampler_seed": seed,
        "executor": "inline",
    }
    return Sweep.model_validate({**dict(digits), **changes, **ARMS[arm]})


class Stopped(Exception):
    """The scheduler wants no more of a trial."""


class Heard:
    """A trial's session in this process: tells the scheduler, with the processor time that each task took."""

    def __init__(self, scheduler: StudyScheduler, trial: SimpleNamespace) -> None:
        self.scheduler, self.trial = scheduler, trial
        self.since = time.process_time()

    def restore(self) -> RunState | None:
        return None

    def report(self, metrics: dict[str, Any], state: RunState | None) -> None:
        seconds = time.process_time() - self.since
        report = TaskReport.model_validate_json(metrics["report"]).model_copy(update={"seconds": seconds})
        told = metrics | {"report": report.model_dump_json()}
        if self.scheduler.on_trial_result(None, self.trial, told) == TrialScheduler.STOP:
            raise Stopped
        self.since = time.process_time()


def drive(sweep: Sweep, folder: Path) -> list[TrialRecord]:
    """What is left of a sweep, one trial after another in this process."""
    with locked(sweep, folder):
        ledger = Ledger(sweep, folder)
        searcher = StudySearcher(ledger)
        scheduler = StudyScheduler(ledger)
        while (settings := searcher.suggest("the only one")) != StudySearcher.FINISHED:
            with contextlib.suppress(Stopped):
                learn(settings, Heard(scheduler, SimpleNamespace(config=settings)))
            searcher.on_trial_complete("the only one")
            record = ledger.record_of(settings["number"])
            value = f"  {sweep.objective} {record.value:.4f}" if record.value is not None else ""
            say_to_stdout(f"{sweep.name} trial {record.number} {record.outcome}{value}  {describe(record.settings)}")
        return ledger.records()


def cost_of(trials: Sequence[TrialRecord]) -> Cost:
    """What trials took that were run one after another."""
    reports = [report for trial in trials for report in trial.reports]
    wall_ms = max(trial.end_ms or 0 for trial in trials) - min(trial.start_ms for trial in trials)
    return Cost(len(reports), sum(report.seconds for report in reports), wall_ms / 1000)


def cost_until(trials: Sequence[TrialRecord], score: float) -> Cost:
    """What the trials took up to the first that finished with at least ``score``; without end if none did."""
    ended = sorted(trials, key=lambda trial: trial.end_ms or 0)
    reached = (at for at, trial in enumerate(ended) if trial.value is not None and trial.value >= score)
    at = next(reached, None)
    return NEVER if at is None else cost_of(ended[: at + 1])


def median(costs: Sequence[Cost]) -> Cost:
    """Each of the three by itself."""
    return Cost(*map(statistics.median, zip(*costs, strict=True)))


def expected_until(sweeps: Sequence[Sequence[TrialRecord]], score: float) -> Cost:
    """The expected running time over seeds: all that was spent before ``score`` by the times it was reached."""
    costs = [cost_until(trials, score) for trials in sweeps]
    reached = sum(cost is not NEVER for cost in costs)
    if not reached:
        return NEVER
    spent = [cost_of(trials) if cost is NEVER else cost for cost, trials in zip(costs, sweeps, strict=True)]
    return Cost(*(sum(column) / reached for column in zip(*spent, strict=True)))


def foretold(sweeps: Sequence[Sequence[TrialRecord]], metric: str) -> list[float | None]:
    """Rank correlation of ``metric`` after each task but the last with the objective, over trials that finished.

    None where all have the same.
    """
    finished = {repr(trial.settings): trial for trials in sweeps for trial in trials if trial.value is not None}
    values = [trial.value for trial in finished.values()]
    early = zip(*([r.metrics[metric] for r in trial.reports[:-1]] for trial in finished.values()), strict=True)
    return [float(spearmanr(after, values).statistic) if len(set(after)) > 1 else None for after in early]


def replayed(pool: Sequence[TrialRecord], stopping: Mapping[str, Any], score: float, order: int) -> tuple[int, bool]:
    """Random search over trials known to their end, in a shuffled order: tasks learnt until ``score``, and if ever.

    What a rule of early stopping would have done is known exactly: it sees nothing but the reports so far.
    """
    rungs = Rungs(Sweep.model_validate({**dict(digits), **stopping}), [])
    learnt = 0
    for number, trial in enumerate(Random(order).sample(pool, len(pool))):
        outcome = Outcome.FINISHED
        for report in trial.reports:
            learnt += 1
            behind = rungs.falls_behind(number, report.tasks_done, report.metrics[digits.rung_metric])
            if behind and report.tasks_done < report.tasks:
                outcome = Outcome.PRUNED
                break
        if outcome is Outcome.FINISHED and (trial.value or 0.0) >= score:
            return learnt, True
        rungs.end(number, outcome)
    return learnt, False


def replays(pool: Sequence[TrialRecord]) -> dict[str, dict[Any, Any]]:
    """For every rule and share of the pool's best: the mean tasks learnt, and how often the score was stopped away."""
    best = max(trial.value or 0.0 for trial in pool)
    said: dict[str, dict[Any, Any]] = {}
    for name, stopping in RULES.items():
        for share in SHARES:
            runs = [replayed(pool, stopping, share * best, order) for order in range(ORDERS)]
            never = sum(not reached for _, reached in runs) / ORDERS
            said.setdefault(name, {})[share] = {"tasks": statistics.fmean(tasks for tasks, _ in runs), "never": never}
    return said


def summary(found: Mapping[str, Sequence[Sequence[TrialRecord]]]) -> dict[str, Any]:
    """All that is said of the arms."""
    everything = [trials for sweeps in found.values() for trials in sweeps]
    best = max(record.value or 0.0 for trials in everything if (record := best_record(trials)))
    arms: dict[str, Any] = {}
    for arm, sweeps in found.items():
        until = {share: expected_until(sweeps, share * best) for share in SHARES}
        each = {share: [cost_until(trials, share * best) for trials in sweeps] for share in SHARES}
        arms[arm] = {
            "best": [record.value if (record := best_record(trials)) else None for trials in sweeps],
            "whole": median([cost_of(trials) for trials in sweeps])._asdict(),
            "until": {share: None if cost is NEVER else cost._asdict() for share, cost in until.items()},
            "each": {
                share: [None if cost is NEVER else cost._asdict() for cost in costs] for share, costs in each.items()
            },
        }
    complete = [trials for arm, sweeps in found.items() if arm != DEFAULT for trials in sweeps]
    pool = [trial for trials in found["random"] for trial in trials[1:]]  # the first is every sweep's
    told = {"foretold": foretold(complete, digits.rung_metric), "pool": len(pool), "replays": replays(pool)}
    return {"best": best, "arms": arms, **told}


def until_table(arms: Mapping[str, Any], share: float, best: float) -> Table:
    """What each arm took to reach a score, and how that stands to the default's."""
    table = Table(title=f"until {share:.0%} of the best score ({share * best:.4f}), expected running time over seeds")
    table.add_column("")
    for column in ("tasks learnt", "ratio", "training s", "ratio", "clock s", "ratio", "tasks, each seed"):
        table.add_column(column, justify="right")
    ours = arms[DEFAULT]["until"][share]
    for arm, row in arms.items():
        took, cells = row["until"][share], []
        for name in Cost._fields:
            cells += [
                f"{took[name]:.0f}" if took else "never",
                f"{took[name] / ours[name]:.2f}" if took and ours else "-",
            ]
        each = ("never" if cost is None else str(cost["tasks"]) for cost in row["each"][share])
        table.add_row(arm, *cells, ", ".join(each))
    return table


def whole_table(arms: Mapping[str, Any]) -> Table:
    """What all of an arm's trials took, what they found."""
    table = Table(title="all trials, medians over seeds")
    table.add_column("")
    for column in ("tasks learnt", "training s", "clock s", "best, each seed"):
        table.add_column(column, justify="right")
    for arm, row in arms.items():
        took = (f"{value:.0f}" for value in row["whole"].values())
        table.add_row(arm, *took, ", ".join(f"{value:.4f}" for value in row["best"]))
    return table


def replay_table(rules: Mapping[str, Any], pool: int) -> Table:
    """What each rule of early stopping takes, and how that stands to none."""
    title = f"random search, {pool} trials replayed in {ORDERS} orders: mean tasks learnt until a share of their best"
    table = Table(title=f"{title}, and how often all that reach it were stopped")
    table.add_column("early stopping")
    for share in SHARES:
        for column in (f"{share:.0%}", "ratio", "never"):
            table.add_column(column, justify="right")
    for rule, row in rules.items():
        cells = []
        for share in SHARES:
            ratio = row[share]["tasks"] / rules["none"][share]["tasks"]
            cells += [f"{row[share]['tasks']:.1f}", f"{ratio:.2f}", f"{row[share]['never']:.0%}"]
        table.add_row(rule, *cells)
    return table


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    seeds: Annotated[str, typer.Option(help="The samplers' seeds, comma-separated: so many sweeps per arm.")] = "0,1,2",
    trials: Annotated[int, typer.Option(min=4, help="Trials per sweep.")] = 14,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs per task; the recipe has 20.")] = 4,
    ray: Annotated[bool, typer.Option("--ray", help="Through Ray Tune.")] = False,
    folder: Annotated[Path, typer.Option(help="What is done, a folder per sweep.")] = Path("results/search"),
    out: Annotated[Path, typer.Option()] = Path("benchmarks/search.json"),
) -> None:
    """Run what is left of all sweeps, the arms of a seed in turn, and say how they stand."""
    quiet_libraries()
    torch.set_num_threads(1)
    found: dict[str, list[list[TrialRecord]]] = {arm: [] for arm in ARMS}
    for index, seed in enumerate(parse_seeds(seeds)):
        turn = index % len(ARMS)
        for arm in [*ARMS][turn:] + [*ARMS][:turn]:
            sweep = make_sweep(arm, seed, trials, epochs)
            place = (folder / sweep.name).absolute()
            if ray:
                uri = default_tracking_uri(place)
                run_sweep(sweep, place, uri, cluster=Cluster("local", at_a_time=1), say=say_to_stdout)
            found[arm].append(drive(sweep, place))
    said = summary(found)
    console = Console(width=140)
    for share in SHARES:
        console.print(until_table(said["arms"], share, said["best"]))
    console.print(whole_table(said["arms"]))
    console.print(replay_table(said["replays"], said["pool"]))
    known = ["all alike" if value is None else f"{value:+.2f}" for value in said["foretold"]]
    by_task = ", ".join(f"{value} after task {task}" for task, value in enumerate(known, start=1))
    console.print(f"rank correlation of {digits.rung_metric} with the objective, trials run to their end: {by_task}")
    facts = {"date": date.today().isoformat(), "torch": version("torch"), "optuna": version("optuna")}
    told = facts | {"seeds": seeds, "ray": ray, "trials": trials, "epochs": epochs} | said
    write_atomically(out, json.dumps(told, indent=2).encode())


if __name__ == "__main__":
    app()
