"""A tabular benchmark of this very problem: learning curves of InfLoRA, and searches replayed on them.

python benchmarks/tables.py make digits-5-linear      records a stream (benchmarks/table_streams.py); resumable
python benchmarks/tables.py make all                  all twelve: hours
python benchmarks/tables.py make my-run.yaml          a stream of your own: a run's config, as `inflora train` takes it
"""

import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyarrow.parquet as pq
import torch
import typer
from table_file import SCHEMA, SEEDS, facts_of, row_of, settings_of, write_table
from table_streams import STREAMS, stream_named

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

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
        folder = drafts / stem
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


if __name__ == "__main__":
    app()
