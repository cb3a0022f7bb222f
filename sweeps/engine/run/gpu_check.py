"""The first thing to do on a GPU machine: every check of the core, and two trials that share a GPU."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from inflora.config import ConfigError
from inflora.cuda import require_cuda, versions
from inflora.gpu_check import CHECKS, digits_run
from inflora.isolated import Bench, Check, Device, Failed, Outcome, Verdict, run_checks
from sweeps.engine.ledger.records import Outcome as TrialOutcome
from sweeps.engine.ledger.records import TrialRecord
from sweeps.engine.run.cluster import Cluster
from sweeps.engine.run.runner import run_sweep, say_to_stdout
from sweeps.engine.space.domains import Real
from sweeps.engine.space.spec import Resources, Sweep


def two_trials(bench: Bench) -> str:
    """Two trials, half a GPU each, at a time: Ray on this machine, Train's workers, study and MLflow."""
    share = 0.5 if bench.device == "cuda" else 0
    sweep = Sweep(
        name="gpu-check",
        base=digits_run(bench),
        space={"optim.lr": Real(low=1e-4, high=1e-3, log=True)},
        trials=2,
        early_stopping="none",
        resources=Resources(gpus_per_worker=share),
    )
    folder = bench.folder / sweep.name
    here = Cluster(address="local", at_a_time=sweep.trials)
    result = run_sweep(sweep, folder, f"sqlite:///{folder / 'mlflow.db'}", cluster=here, say=say_to_stdout)
    for record in result.records:
        if record.outcome is not TrialOutcome.FINISHED:
            raise Failed(f"trial {record.number} {record.outcome}: {record.reason}")
    if not result.delivered:
        raise Failed("MLflow has not taken everything")
    return f"{share:g} GPUs each, both learning for {_together_s(result.records):.0f} s"


def _together_s(records: Sequence[TrialRecord]) -> float:
    """The seconds in which all of some trials were learning."""
    starts = [record.reports[0].time_ms / 1000 - record.reports[0].seconds for record in records]
    ends = [record.reports[-1].time_ms / 1000 for record in records]
    return max(0.0, min(ends) - max(starts))


ALL_CHECKS: dict[str, Check] = {**CHECKS, "two trials on one GPU": two_trials}


def check_gpu(device: str, log: Path, say: Callable[[str], None], checks: Mapping[str, Check]) -> bool:
    """Run all checks and show each as it ends; what failed ones have printed goes to ``log``. Whether none failed.

    Raises:
        ConfigError: Another device than cuda and cpu, or cuda where there is none.
    """
    chosen = _parse_device(device)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="inflora-", ignore_cleanup_errors=True) as folder, _shown(say) as show:
        for outcome in run_checks(checks, chosen, Path(folder)):
            outcomes.append(outcome)
            show(outcome)
    counts = Counter(outcome.verdict for outcome in outcomes)
    seconds = sum(outcome.seconds for outcome in outcomes)
    say(", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict]) + f" in {seconds:.0f} s")
    failed = [outcome for outcome in outcomes if outcome.verdict is Verdict.FAILED]
    if failed:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("\n".join(f"{each.name}: {each.detail}\n\n{each.printed}" for each in failed))
        say(f"what {', '.join(each.name for each in failed)} printed is in {log}")
    return not failed


def _parse_device(name: str) -> Device:
    if name == "cuda":
        require_cuda()
        return "cuda"
    if name == "cpu":
        return "cpu"
    raise ConfigError(f"--device must be cuda or cpu, got {name!r}")


@contextmanager
def _shown(say: Callable[[str], None]) -> Iterator[Callable[[Outcome], None]]:
    """A table that grows where it can be drawn again, else a line for each check."""
    console, title = Console(), f"GPU check: {versions()}"
    if not console.is_interactive:
        say(title)
        yield lambda each: say(f"{each.verdict:9}  {each.name:21}  {each.seconds:4.0f} s  {each.detail}")
        return
    table = Table(title=title)
    for column in ("check", "", "seconds", "found"):
        table.add_column(column, justify="right" if column == "seconds" else "left")

    def show(each: Outcome) -> None:
        colour = {Verdict.PASSED: "green", Verdict.FAILED: "red"}.get(each.verdict, "yellow")
        table.add_row(escape(each.name), f"[{colour}]{each.verdict}[/]", f"{each.seconds:.0f}", escape(each.detail))

    with Live(table, console=console):
        yield show
