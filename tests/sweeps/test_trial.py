"""One trial: what it reports, what it goes on from, and what it can never see."""

import json

import pytest

from inflora.config import override
from inflora.storage import SharedFolder
from sweeps.engine.driver import forget_if_torn
from sweeps.engine.records import TaskReport
from sweeps.engine.trial import learn


class MemorySession:
    """Keeps what a trial hands over."""

    def __init__(self, state=None):
        self.state, self.heard = state, []

    def restore(self):
        return self.state

    def report(self, metrics, state):
        self.heard.append(metrics)
        self.state = state

    @property
    def reports(self):
        return [TaskReport.model_validate_json(metrics["report"]) for metrics in self.heard]


def settings_of(config, tasks_done=0, tasks=None, shared=None):
    settings = {"tasks_done": tasks_done, "tasks": tasks, "number": 0, "gpus": 0, "shared": shared}
    return {"config": config.model_dump(mode="json"), **settings}


def test_a_report_per_task_and_the_objective_only_with_the_last(tiny_sweep):
    session = MemorySession()
    learn(settings_of(tiny_sweep.base), session)
    assert [r.tasks_done for r in session.reports] == [1, 2, 3, 4, 5]
    assert ["acc/final" in r.metrics for r in session.reports] == [False] * 4 + [True]
    assert [len(r.accuracies) for r in session.reports] == [1, 2, 3, 4, 5]


class Interrupted(Exception):
    pass


class InterruptedSession(MemorySession):
    """Dies after two tasks; what Train has kept by then is there, what it passed on may not be."""

    def report(self, metrics, state):
        super().report(metrics, state)
        if len(self.heard) == 2:
            raise Interrupted


def without_times(report):
    return report.model_dump(exclude={"seconds", "time_ms"})


@pytest.mark.parametrize("heard", [0, 1, 2])
def test_an_interrupted_trial_tells_what_the_ledger_has_not_heard_and_ends_with_the_same_numbers(tiny_sweep, heard):
    whole = MemorySession()
    learn(settings_of(tiny_sweep.base), whole)
    first = InterruptedSession()
    with pytest.raises(Interrupted):
        learn(settings_of(tiny_sweep.base), first)
    second = MemorySession(first.state)
    learn(settings_of(tiny_sweep.base, tasks_done=heard), second)
    assert [without_times(r) for r in second.reports] == [without_times(r) for r in whole.reports[heard:]]


def test_a_trial_killed_after_its_last_task_still_tells_its_result(tiny_sweep):
    whole = MemorySession()
    learn(settings_of(tiny_sweep.base), whole)
    again = MemorySession(whole.state)
    learn(settings_of(tiny_sweep.base, tasks_done=4), again)
    assert [without_times(r) for r in again.reports] == [without_times(whole.reports[-1])]


def test_a_loss_that_is_not_a_number_is_told_as_the_trials_failure(tiny_sweep):
    session = MemorySession()
    learn(settings_of(override(tiny_sweep.base, {"optim.lr": 1e30, "optim.epochs": 3})), session)
    assert "FloatingPointError: the loss of task 0" in session.heard[-1]["failure"]


def test_a_trial_works_where_no_test_image_can_be_read(tiny_sweep, tmp_path):
    config = override(tiny_sweep.base, {"data.root": tmp_path})
    learn(settings_of(config), MemorySession())
    (tmp_path / "digits" / "test-00000.arrow").unlink()
    session = MemorySession()
    learn(settings_of(config), session)
    assert len(session.reports) == 5


def test_no_setting_of_a_trial_names_the_test_split(tiny_sweep):
    assert "test" not in json.dumps(settings_of(tiny_sweep.base))


@pytest.mark.parametrize(
    ("snapshot", "kept"), [('{"checkpoint_results": []}', True), ('{"checkpoint_re', False), ("", False)]
)
def test_a_trial_whose_list_of_checkpoints_was_written_in_part_begins_anew(tmp_path, snapshot, kept):
    run = tmp_path / "tiny-0000"
    run.mkdir()
    (run / "checkpoint_manager_snapshot.json").write_text(snapshot)
    forget_if_torn(SharedFolder(str(tmp_path)), run.name)
    assert run.exists() == kept
    forget_if_torn(SharedFolder(str(tmp_path)), "tiny-0001")  # has kept nothing yet
