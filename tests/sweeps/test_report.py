"""A sweep's page says everything, needs nothing, and a browser draws all of it."""

import csv
import io
import os
import re
import shutil
import subprocess

import pytest

from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.lock import is_driven
from sweeps.engine.ledger.study import load_study
from sweeps.engine.ledger.trials import read_records
from sweeps.engine.run.runner import locked
from sweeps.engine.show.report import page
from sweeps.engine.show.tables import csv_table, latex_table
from sweeps.engine.space.estimate import estimate
from sweeps.engine.space.spec import Sweep

from .conftest import learn_all, report

BROWSER = os.environ.get("INFLORA_BROWSER") or next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


GPU = {"gpus_per_worker": 1}


def with_changes(sweep, **changes) -> Sweep:
    return Sweep.model_validate({**sweep.model_dump(), **changes})


def some_trials(sweep, folder, finished=8):
    ledger = Ledger(sweep, folder)
    for index in range(finished):
        number = ledger.propose().number
        for done in range(1, 5):
            ledger.report(number, report(done, 0.9 - 0.02 * done + 0.01 * index))
        last = report(5, 0.7 + 0.02 * index)
        memory = {f"memory/block{block}/{kind}": 0.3 for block in range(12) for kind in ("size", "kept", "overlap")}
        own = memory | {"forgetting": 0.1 + 0.01 * index}
        ledger.report(number, last.model_copy(update={"metrics": last.metrics | own}))
        ledger.close(number)
    number = ledger.propose().number
    ledger.report(number, report(1, 0.1))
    assert ledger.report(number, report(2, 0.1))
    ledger.fail(ledger.propose().number, "FloatingPointError: the loss <b>is</b> nan")
    return load_study(sweep, folder)


@pytest.fixture
def sweep(tiny_sweep) -> Sweep:
    return with_changes(tiny_sweep, trials=12)


def test_the_page_tells_the_best_config_every_trial_and_why_some_ended(sweep, tmp_path):
    text = page(sweep, some_trials(sweep, tmp_path))
    assert "<dt>adapter.rank</dt>" in text
    assert "observed 84.0" in text
    assert "rank: " in text
    assert "behind others after 2 tasks" in text
    assert "the loss &lt;b&gt;is&lt;/b&gt; nan" in text, "what trials say is text, not markup"
    assert "10 of 12 trials ended: 8 finished, 1 pruned, 1 failed" in text


def test_the_page_needs_nothing_from_elsewhere(sweep, tmp_path):
    text = page(sweep, some_trials(sweep, tmp_path))
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", text)


@pytest.mark.parametrize("finished", [0, 1])
def test_there_is_a_page_before_much_is_known(sweep, tmp_path, finished):
    ledger = Ledger(sweep, tmp_path)
    for _ in range(finished):
        learn_all(ledger, ledger.propose().number, [0.9] * 5)
    assert ("No trial has finished" in page(sweep, load_study(sweep, tmp_path))) is (finished == 0)


def test_the_first_screen_decides(sweep, tmp_path):
    sweep = with_changes(sweep, trials=12, early_stopping="none", sampler="random", budget={"until_gain": 50.0})
    ledger = Ledger(sweep, tmp_path)
    ledger.note_images(350)
    for index in range(12):
        if (proposal := ledger.propose()) is None:
            break
        learn_all(ledger, proposal.number, [0.5 + index / 100] * 5)
    known = estimate(sweep, ledger.records(), images=350)
    best, told = known.best(), known.of_trials()[known.best().number]
    text = page(sweep, load_study(sweep, tmp_path))
    first_screen = text[text.index("<body>") : text.index("The score over the space")]
    assert f"Trial {best.number}." in first_screen
    assert f"{100 * told.mean:.1f} %" in first_screen
    assert f"95 % between {100 * told.low:.1f} and {100 * told.high:.1f}" in first_screen
    difference = known.difference(best.settings, sweep.first[0])
    assert f"{100 * difference.mean:+.1f} points against the recipe&#x27;s first setting" in first_screen
    assert "Hardly." in first_screen
    assert f"The next 8 trials are expected to add {100 * known.expected_gain():.2f} points" in first_screen


def test_the_surface_is_shown_from_eight_finished_trials_on(sweep, tmp_path):
    sweep = with_changes(sweep, trials=12, early_stopping="none", sampler="random")
    ledger = Ledger(sweep, tmp_path)
    for finished in range(1, 9):
        learn_all(ledger, ledger.propose().number, [0.5 + finished / 100] * 5)
        if finished < 7:
            continue
        text = page(sweep, load_study(sweep, tmp_path))
        assert ("8 finished trials can tell of it; there are 7." in text) is (finished == 7)
        assert ("Along each setting" in text) is (finished == 8)


@pytest.mark.parametrize(("finished", "shown"), [(9, False), (10, True)])
def test_importances_of_tradeoffs_are_shown_from_ten_finished_trials(sweep, tmp_path, finished, shown):
    sweep = with_changes(sweep, trials=12, early_stopping="none", tradeoffs=("cost/gpu_hours",), resources=GPU)
    ledger = Ledger(sweep, tmp_path)
    for index in range(finished):
        learn_all(ledger, ledger.propose().number, [0.5 + index / 100] * 5)
    text = page(sweep, load_study(sweep, tmp_path))
    assert (f"from {finished} finished trials" in text) is shown
    assert ("need 10 finished trials to mean anything; there are 9" in text) is not shown
    assert "name='viewport'" in text
    assert "on validation images" in text


def test_a_sweep_without_a_driver_is_stopped_and_says_how_to_go_on(sweep, tmp_path):
    text = page(sweep, some_trials(sweep, tmp_path), driven=False)
    assert "stopped: no process runs this sweep; the command that began it goes on with it" in text
    assert "to go at this pace" not in text
    assert not is_driven(tmp_path)
    with locked(sweep, tmp_path):
        assert is_driven(tmp_path)


def test_the_table_is_written_with_every_digit_or_for_a_paper(sweep, tmp_path):
    records = read_records(some_trials(sweep, tmp_path))
    known = estimate(sweep, records, images=350)
    rows = list(csv.DictReader(io.StringIO(csv_table(sweep, records, known))))
    assert len(rows) == len(records)
    assert {row["trial"]: row["acc/final"] for row in rows}["4"] == repr(records[4].value)
    assert {float(row["adapter.energy"]) for row in rows} == {each.settings["adapter.energy"] for each in records}
    told = {number: repr(each.mean) for number, each in known.of_trials().items()}
    assert {int(row["trial"]): row["estimate/mean"] for row in rows if row["estimate/mean"]} == told
    assert [int(row["trial"]) for row in rows[:8]] == [record.number for record in known.ranking()]
    lines = latex_table(sweep, records, known).splitlines()
    assert lines[3] == r"trial & adapter.rank & adapter.energy & optim.lr & acc/final & estimate \\"
    assert len(lines) == 7 + 8, "finished trials only, the best first"
    assert lines[5].startswith(f"{known.best().number} & ")
    assert r" $\pm$ 0." in lines[5]


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on the path, and INFLORA_BROWSER names none")
@pytest.mark.parametrize("tradeoffs", [(), ("forgetting",)], ids=["one objective", "two objectives"])
def test_a_browser_draws_every_plot_without_a_word_on_its_console(sweep, tmp_path, tradeoffs):
    sweep = with_changes(sweep, tradeoffs=tradeoffs, trials=12)
    text = page(sweep, some_trials(sweep, tmp_path))
    plots = text.count('class="plotly-graph-div"')
    assert plots >= 16
    assert plots <= 25, "a model of many blocks has no more plots than one of few"
    (tmp_path / "report.html").write_text(text)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--enable-logging=stderr"]
    command = [
        BROWSER,
        *options,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        f"file://{tmp_path}/report.html",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert re.findall(r"CONSOLE.*", done.stderr) == []
    drawn = re.findall(r'class="plotly-graph-div js-plotly-plot"', done.stdout)
    assert len(drawn) == plots
    assert done.stdout.count('class="main-svg"') >= plots
