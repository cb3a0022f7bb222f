"""What is seen while a sweep runs, and what stays on the storage when trials end."""

from pathlib import Path

import pytest
from rich.console import Console

from sweeps.engine.checkpoints import TRIALS, Housekeeping
from sweeps.engine.ledger import Ledger
from sweeps.engine.progress import LiveTable, ProgressLines
from sweeps.engine.records import trial_name
from sweeps.engine.spec import Sweep
from sweeps.engine.storage import SharedFolder

from .conftest import learn_all, report


class TuneTrial:
    """What callbacks look at of Tune's trial."""

    def __init__(self, number: int) -> None:
        self.config = {"number": number}


@pytest.fixture
def ledger(tiny_sweep, tmp_path) -> Ledger:
    return Ledger(tiny_sweep, tmp_path)


def test_lines_tell_every_start_task_retry_and_end(ledger):
    lines: list[str] = []
    told = ProgressLines(ledger, lines.append)
    number = ledger.propose().number
    told.on_trial_start(0, [], TuneTrial(number))
    told.on_trial_result(0, [], TuneTrial(number), {"tasks_done": 1, "acc/seen": 0.9})
    ledger.fail(number, "ActorDiedError: gone")
    told.on_trial_error(0, [], TuneTrial(number))
    ledger.propose()
    learn_all(ledger, number, [0.9] * 5)
    told.on_trial_complete(0, [], TuneTrial(number))
    assert lines == [
        "trial   0 starts  method.rank=10  method.energy=0.95  optim.lr=0.0005",
        "trial   0 task 1  acc/seen 90.0 %",
        "trial   0 failed, is tried again from its last finished task: ActorDiedError: gone",
        "trial   0 finished  acc/final 90.0 %  (1/4)",
    ]


def test_a_terminal_has_one_table_with_what_runs_what_ended_and_what_is_left(ledger):
    learn_all(ledger, ledger.propose().number, [0.9] * 5)
    running = ledger.propose().number
    ledger.report(running, report(1, 0.77))
    console = Console(width=140, force_terminal=True, record=True)
    with LiveTable(ledger).shown(console):
        pass
    text = console.export_text()
    assert "finished" in text
    assert "0.9000" in text
    assert "77.0" in text
    assert "1/5" in text
    assert "1 of 4 trials ended: 1 running, 1 finished" in text


def states(folder: Path) -> set[int]:
    return {int(path.name[-4:]) for path in (folder / TRIALS).iterdir()}


def keep_state(ledger: Ledger, folder: Path, number: int, size: int = 1000) -> None:
    path = (folder / TRIALS) / trial_name(ledger.sweep.study_name, number)
    path.mkdir(parents=True, exist_ok=True)
    (path / "state").write_bytes(bytes(size))


def test_only_the_best_ended_trials_state_and_those_of_running_ones_stay(tiny_sweep, tmp_path):
    sweep = tiny_sweep.model_copy(update={"early_stopping": "none"})
    ledger = Ledger(sweep, tmp_path)
    housekeeping = Housekeeping(ledger, SharedFolder(str(tmp_path)))
    numbers = [ledger.propose().number for _ in range(4)]
    for number in numbers:
        keep_state(ledger, tmp_path, number)
    housekeeping.tidy()
    assert states(tmp_path) == {0, 1, 2, 3}
    learn_all(ledger, 0, [0.7] * 5)
    learn_all(ledger, 1, [0.8] * 5)
    ledger.fail(2, "FloatingPointError")
    housekeeping.on_trial_complete(0, [], TuneTrial(2))
    assert states(tmp_path) == {1, 3}
    ledger.fail(3, "ActorDiedError: it comes back")
    housekeeping.on_trial_error(0, [], TuneTrial(3))
    assert states(tmp_path) == {1, 3}, "what is tried again goes on from its state"


def test_a_sweep_that_needs_more_room_than_it_has_ends_and_says_so(tiny_sweep, tmp_path):
    ledger = Ledger(Sweep.model_validate(tiny_sweep.model_dump() | {"budget": {"storage_gb": 1e-6}}), tmp_path)
    number = ledger.propose().number
    keep_state(ledger, tmp_path, number, size=999)
    Housekeeping(ledger, SharedFolder(str(tmp_path))).tidy()
    assert ledger.why_over() == ""
    keep_state(ledger, tmp_path, number, size=2000)
    Housekeeping(ledger, SharedFolder(str(tmp_path))).tidy()
    assert ledger.why_over().startswith("storage budget spent")
    assert ledger.propose() is None
