"""Where a trial's log is: told by the trial itself, kept in the study, shown by status and MLflow."""

from pathlib import Path

import pytest
import ray

from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.trials import read_records
from sweeps.engine.run.nodes import likeness
from sweeps.engine.run.runner import run_sweep
from sweeps.engine.run.trial import run_trial
from sweeps.engine.run.tune import StudyScheduler
from sweeps.engine.show.mirror import Mirror
from sweeps.engine.show.status import trial_lines

from .conftest import learn_all, sqlite
from .test_progress import TuneTrial
from .test_tracking import TAGS, all_runs
from .test_trial import MemorySession, settings_of

HERE, THERE = "192.0.2.1:/logs/worker-1.err", "192.0.2.2:/logs/worker-2.err"


@pytest.fixture
def ledger(tiny_sweep, tmp_path) -> Ledger:
    return Ledger(tiny_sweep.model_copy(update={"early_stopping": "none"}), tmp_path)


def tell(ledger, number, log):
    """The trial's report, as Tune passes it on."""
    StudyScheduler(ledger).on_trial_result(None, TuneTrial(number), {"acc/seen": 0.0, "log": log})


def test_of_several_workers_of_a_trial_the_last_ones_log_is_kept_over_restarts(ledger, tmp_path):
    number = ledger.propose().number
    tell(ledger, number, HERE)
    ledger.fail(number, "ActorDiedError: gone")
    ledger.propose()
    tell(ledger, number, THERE)
    assert ledger.record_of(number).log == THERE
    again = Ledger(ledger.sweep, tmp_path)
    assert again.record_of(number).log == THERE
    learn_all(again, again.propose().number, [0.9] * 5)
    assert [record.log for record in read_records(again.study)] == [THERE]


def test_status_names_the_logs_of_trials_that_run_or_failed(ledger):
    failed, running, finished, _mute = (ledger.propose().number for _ in range(4))
    tell(ledger, failed, HERE)
    tell(ledger, running, THERE)
    tell(ledger, finished, HERE)
    ledger.fail(failed, "FloatingPointError: the loss is nan")
    learn_all(ledger, finished, [0.9] * 5)
    records = ledger.records()
    assert trial_lines(records, driven=True) == [
        f"trial {failed} failed: FloatingPointError: the loss is nan; log {HERE}",
        f"trial {running} running: log {THERE}",
    ]
    assert trial_lines(records, driven=False)[1] == f"trial {running} interrupted: log {THERE}"


def test_a_log_from_a_foreign_study_cannot_draw_on_the_terminal(ledger):
    number = ledger.propose().number
    tell(ledger, number, "a\x1b[2J\nb")
    assert trial_lines(ledger.records(), driven=True) == [f"trial {number} running: log a\\x1b[2J b"]


def test_the_trials_run_in_mlflow_names_the_log_of_its_last_worker(ledger, tmp_path):
    number = ledger.propose().number
    mirror = Mirror(ledger.sweep, tmp_path, sqlite(tmp_path), TAGS)
    for log in (HERE, THERE):
        tell(ledger, number, log)
        mirror.sync()
    _, _, children = all_runs(sqlite(tmp_path))
    assert children[number].data.tags["inflora.log"] == THERE


def test_a_trial_tells_of_its_log_before_anything_of_it_can_fail(tiny_sweep, monkeypatch, capsys):
    monkeypatch.setattr(
        "sweeps.engine.run.reports.global_worker.get_err_file_path", lambda: HERE.partition(":")[2], raising=False
    )
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: HERE.partition(":")[0])
    monkeypatch.setattr("ray.get_runtime_context", lambda: pytest.fail("asked which node this is"))
    session = MemorySession()
    wanted = likeness(tiny_sweep.base.data)._replace(code="another")
    settings = settings_of(tiny_sweep.base) | {"name": "tiny-0000", "likeness": wanted._asdict()}
    with pytest.raises(pytest.fail.Exception, match="which node"):
        run_trial(settings, session)
    assert [told.get("log") for told in session.heard] == [HERE]
    assert "trial 0 (tiny-0000) starts here" in capsys.readouterr().err


@pytest.mark.cluster
@pytest.mark.parametrize("executor", ["inline", pytest.param("train", marks=pytest.mark.slow)])
def test_the_file_that_is_named_holds_what_the_trial_printed(tiny_sweep, tmp_path, executor):
    sweep = tiny_sweep.model_copy(update={"trials": 2, "executor": executor, "early_stopping": "none"})
    for record in run_sweep(sweep, tmp_path, sqlite(tmp_path), say=print).records:
        address, _, path = record.log.partition(":")
        assert address == ray.util.get_node_ip_address()
        assert f"trial {record.number} ({sweep.study_name}-{record.number:04d}" in Path(path).read_text()
