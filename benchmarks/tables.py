"""A tabular benchmark of this very problem: learning curves of InfLoRA, and searches replayed on them.

python benchmarks/tables.py make digits-5-linear      records a stream (benchmarks/table_streams.py); resumable
python benchmarks/tables.py make all                  all twelve: an hour and a half on two cores
python benchmarks/tables.py make my-run.yaml          a stream of your own: a run's config, as `inflora train` takes it
python benchmarks/tables.py replay --table digits-5-linear --search gp
python benchmarks/tables.py choose                    all ways to search, on the six tables to choose on
python benchmarks/tables.py judge                     the default, on the six to prove on: docs/search.md's figures
python benchmarks/tables.py planted                   does this way of measuring find a planted order of searches?
python benchmarks/tables.py looks digits-4-linear     what cheaper looks say of the full score

Regret is true: the best setting's accuracy less that of the setting that would be exported, in points, over all
recorded images and seeds. Budgets are tasks, those of stopped trials included: so many trials times the stream's tasks.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow.parquet as pq
import torch
import typer
from pairs_report import table, write_section
from table_file import SCHEMA, SEEDS, facts_of, read_table, row_of, settings_of, write_table
from table_planted import agreement
from table_replay import ARMS, DEFAULT, Arm, Job, known_table, near_paper, portfolio, replayed
from table_report import JUDGEMENT, Regrets, judgement, picture, regrets, shown
from table_streams import CHOOSING, PROVING, STREAMS, stream_named

from inflora.config import ConfigError, config_hash
from inflora.console import OneLineGroup

app = typer.Typer(cls=OneLineGroup, add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

TABLES = Path(__file__).parent / "tables"
Drafts = Annotated[Path, typer.Option(help="Where images and trainings are kept while a table is made.")]


@app.callback()
def _main() -> None:
    """Record learning curves, and replay searches on them."""


@app.command()
def make(
    stream: Annotated[str, typer.Argument(help=f"all, a run's .yaml, or one of: {', '.join(STREAMS)}.")],
    drafts: Drafts = Path("results/tables"),
    out: Annotated[Path, typer.Option(help="Folder of the tables.")] = TABLES,
    jobs: Annotated[int, typer.Option(help="Trainings at a time.")] = os.cpu_count() or 1,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each setting.")] = len(SEEDS),
) -> None:
    """Record every setting of a stream with every seed; what is done is not done again."""
    for name in STREAMS if stream == "all" else [stream]:
        recorded = stream_named(name)
        root = (drafts / "data").absolute()
        recorded.prepare(root)
        settings = range(len(settings_of(recorded.sweep("table").space)))
        # Seed by seed: a table that is not whole yet has all settings.
        wanted = [(setting, seed) for seed in range(seeds) for setting in settings]
        stem = Path(name).stem
        folder = drafts / f"{stem}-{config_hash(recorded.base)}"  # a changed file of the same name begins anew
        folder.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            waiting = [pool.submit(_kept, name, root, *each, folder) for each in wanted]
            for number, done in enumerate(as_completed(waiting), 1):
                done.result()
                if number % 48 == 0 or number == len(wanted):
                    print(f"{stem}: {number} of {len(wanted)} trainings", flush=True)
        rows = [pq.read_table(_draft(folder, *each), schema=SCHEMA) for each in wanted]
        write_table(rows, facts_of(name, root), out / f"{stem}.parquet")
        print(f"{stem}: {out / f'{stem}.parquet'}", flush=True)


def _draft(folder: Path, setting: int, seed: int) -> Path:
    return folder / f"{seed}-{setting:03d}.parquet"


def _kept(name: str, root: Path, setting: int, seed: int, folder: Path) -> None:
    """One training, unless it is there."""
    path = _draft(folder, setting, seed)
    if not path.exists():
        draft = path.with_suffix(".new")
        pq.write_table(row_of(name, root, setting, seed), draft)
        draft.rename(path)


BUDGETS = (12, 24, 48)
CURVE = (4, 8, 12, 16, 20, 24, 32, 40, 48)
RANDOM_CURVE = (*CURVE, 64, 80, 96)
STOPPED_CURVE = tuple(trials for trials in CURVE if trials <= 24)
"""Trials' worth of tasks at which a replay is asked where it stands; random search up to the whole table, and not so
far where many trials are stopped: a table would be used up."""

JUDGED = {name: ARMS[name] for name in ("random", "random, estimated", "tpe + asha", DEFAULT)}

Replays = Annotated[int, typer.Option(min=2, help="Replays of each way to search.")]
Jobs = Annotated[int, typer.Option(min=1, help="Replays at a time.")]
Images = Annotated[int | None, typer.Option(help="Validation images of a replay; default: the stream's own number.")]
Tables = Annotated[Path, typer.Option(help="Folder of the tables.")]
CORES = os.cpu_count() or 1


def found_on(
    file: Path, arms: Mapping[str, Arm], replays: int, jobs: int, images: int | None = None
) -> dict[str, Regrets]:
    """Where every way to search stands at every budget, on one table."""
    found = {}
    with ProcessPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for label, arm in arms.items():
            stops = arm.forecasts or arm.optunas or "early_stopping" in arm.changes
            trials = RANDOM_CURVE if arm == ARMS["random"] else STOPPED_CURVE if stops else CURVE
            todo = [Job(file, arm, number, trials, images) for number in range(replays)]
            found[label] = regrets(trials, list(pool.map(replayed, todo, chunksize=4)))
    return found


def file_of(table: str, tables: Path) -> Path:
    """A table's file, by its stream's name or as a path.

    Raises:
        ConfigError: There is none.
    """
    file = Path(table) if table.endswith(".parquet") else tables / f"{table}.parquet"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in tables.glob("*.parquet"))) or "none"
        raise ConfigError(f"no table {table}; recorded: {known}")
    return file


@app.command()
def replay(
    recorded: Annotated[str, typer.Option("--table", help="A recorded stream, or a .parquet file.")],
    search: Annotated[str, typer.Option(help=f"One of: {'; '.join(ARMS)}.")],
    trials: Annotated[int, typer.Option(min=4, help="The budget in the middle; half and twice it are shown too.")] = 24,
    replays: Replays = 200,
    jobs: Jobs = CORES,
    images: Images = None,
    out: Annotated[Path | None, typer.Option(help="A picture of regret against tasks spent.")] = None,
    tables: Tables = TABLES,
) -> None:
    """Replay one way to search on one table, and random search beside it."""
    if search not in ARMS:
        raise ConfigError(f"unknown --search {search!r}; known: {'; '.join(ARMS)}")
    file = file_of(recorded, tables)
    known = read_table(file)
    arms = {name: ARMS[name] for name in dict.fromkeys(("random", search))}
    found = found_on(file, arms, replays, jobs, images)
    budgets = tuple(min(CURVE, key=lambda each: abs(each - wanted)) for wanted in (trials // 2, trials, 2 * trials))
    print(f"{file.stem}: {known.tasks} tasks, {len(known.settings)} settings, {replays} replays; mean regret in points")
    print("\n".join(shown(found, budgets, found["random"], known.tasks)))
    if out is not None:
        picture({file.stem: found}, out)
        print(out)


@app.command()
def choose(
    replays: Replays = 40,
    jobs: Jobs = CORES,
    only: Annotated[str, typer.Option(help="Ways to search, separated by semicolons.")] = "",
    tables: Tables = TABLES,
) -> None:
    """All ways to search on the tables to choose on; what is tried first is learnt from the other five."""
    files = {stream: file_of(stream, tables) for stream in CHOOSING}
    totals: dict[str, list[Regrets]] = {}
    for stream, file in files.items():
        others = [known_table(other) for name, other in files.items() if name != stream]
        starts = {
            "gp, portfolio": Arm({"sampler": "gp"}, first=portfolio(others, 4)),
            "gp, near the paper": Arm({"sampler": "gp"}, first=near_paper(known_table(file), 4)),
        }
        arms = {name: arm for name, arm in (ARMS | starts).items() if not only or name in only.split(";")}
        found = found_on(file, {"random": ARMS["random"], **arms}, replays, jobs)
        print(f"### {stream}\n")
        print("\n".join(shown(found, BUDGETS, found["random"], known_table(file).tasks)), flush=True)
        for name, each in found.items():
            totals.setdefault(name, []).append(each)
    print("### all six: mean regret\n")
    rows = []
    for name, several in totals.items():
        asked = [trials for trials in BUDGETS if trials in several[0].trials]
        rows.append([name, *(f"{np.mean([each.at(trials).mean() for each in several]):.2f}" for trials in asked)])
    print("\n".join(table(["search", *(f"{trials} trials" for trials in BUDGETS)], rows)))


@app.command("planted")
def planted_order(surfaces: int = 6, replays: int = 30) -> None:
    """Does this way of measuring find a planted order of searches?"""
    names = ("random", "random, estimated", "tpe", "tpe, estimated", "gp")
    found = agreement({name: ARMS[name] for name in names}, surfaces, replays)
    rows = [[kind, *(f"{mean:.2f}" for mean in means), f"{tau:.2f}"] for kind, (means, tau) in found.items()]
    print("\n".join(table(["truth", *names, "tau with the planted"], rows)))


@app.command()
def looks(stream: str, drafts: Drafts = Path("results/tables"), jobs: Jobs = CORES, tables: Tables = TABLES) -> None:
    """Rank correlations of cheaper looks with the full score, over a table's settings."""
    from table_looks import cheaper_looks

    print("\n".join(cheaper_looks(stream, file_of(stream, tables), drafts, jobs)))


@app.command()
def judge(
    replays: Replays = 200,
    jobs: Jobs = CORES,
    images: Images = None,
    only: Annotated[str, typer.Option(help="Tables to judge on, separated by commas; default: the six.")] = "",
    tables: Tables = TABLES,
    page: Annotated[Path | None, typer.Option(help="A page whose part on this is written anew.")] = None,
) -> None:
    """The default way to search against random search, on the tables that nothing was chosen on."""
    files = {name: file_of(name, tables) for name in (only.split(",") if only else PROVING)}
    found = {}
    for name, file in files.items():
        found[Path(name).stem] = found_on(file, JUDGED, replays, jobs, images)
        print(f"{name}: {replays} replays of {len(JUDGED)} ways to search", flush=True)
    section = judgement(found, {Path(name).stem: read_table(file).tasks for name, file in files.items()}, replays)
    print(section)
    if page is not None:
        write_section(page, JUDGEMENT, section)
        picture(found, page.parent / "search-regret.png")


if __name__ == "__main__":
    app()
