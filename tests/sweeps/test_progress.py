"""What is seen while a sweep runs."""

import pytest
from rich.console import Console

from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.show.progress import LiveTable, ProgressLines, progress_on

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
        "trial   0 starts  adapter.rank=10  adapter.energy=0.95  optim.lr=0.0005",
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
    assert "0.9000 \u00b1 0." in text
    assert "77.0" in text
    assert "1/5" in text
    assert "1 of 4 trials ended: 1 running, 1 finished" in text


def test_where_a_sweep_stands_is_seen_however_many_trials_run(tiny_sweep, tmp_path):
    many = Ledger(tiny_sweep.model_copy(update={"trials": 80, "sampler": "random"}), tmp_path)
    learn_all(many, many.propose().number, [0.9] * 5)
    for _ in range(64):
        many.propose()
    console = Console(width=100, height=24, force_terminal=True, record=True)
    with LiveTable(many).shown(console):
        pass
    lines = console.export_text().splitlines()
    assert len(lines) <= 24
    assert any("1 of 80 trials ended: 64 running, 1 finished" in line for line in lines)
    assert any("finished" in line and "0.9000" in line for line in lines)
    assert any("more that run" in line for line in lines)


@pytest.mark.parametrize(("term", "shown"), [("xterm-256color", LiveTable), ("dumb", ProgressLines)])
def test_a_terminal_that_cannot_draw_again_has_lines(ledger, monkeypatch, term, shown):
    monkeypatch.setenv("TERM", term)
    assert type(progress_on(Console(force_terminal=True), ledger, print)) is shown
    assert type(progress_on(Console(force_terminal=False), ledger, print)) is ProgressLines
