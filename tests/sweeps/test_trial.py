"""One trial: what it reports, what it goes on from, and what it can never see."""

import json
import threading
import time

import pytest
from ray.exceptions import ActorDiedError
from ray.train import UserCallback

from inflora.config import config_hash, override
from inflora.continual import run
from inflora.state import load_state, save_state
from inflora.storage import SharedFolder
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.records import TaskReport
from sweeps.engine.run import driver
from sweeps.engine.run.driver import forget_if_torn
from sweeps.engine.run.session import InlineSession
from sweeps.engine.run.trial import learn
from sweeps.engine.run.tune import StudySearcher
from sweeps.engine.space.spec import Resources
from tests.conftest import same_state
from tests.simulated_gpu import simulated_gpu

from .conftest import Anywhere


class MemorySession:
    """Keeps what a trial hands over."""

    def __init__(self, state=None):
        self.state, self.heard = state, []

    def restore(self):
        return self.state

    def forget(self):
        self.state = None

    def report(self, metrics, state):
        self.heard.append(metrics)
        self.state = state

    @property
    def reports(self):
        return [TaskReport.model_validate_json(metrics["report"]) for metrics in self.heard]


def settings_of(config, tasks_done=0, tasks=None):
    settings = {"tasks_done": tasks_done, "tasks": tasks, "number": 0, "gpus": 0}
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


def test_a_trial_in_a_long_task_says_after_an_epoch_that_it_lives(tiny_sweep, monkeypatch):
    whole, often = MemorySession(), MemorySession()
    settings = settings_of(override(tiny_sweep.base, {"optim.epochs": 3}), tasks=2)
    learn(settings, whole)
    monkeypatch.setattr("sweeps.engine.run.trial.ALIVE_EVERY_S", 0.0)
    learn(settings, often)
    assert ["report" in told for told in whole.heard] == [True] * 2, "seldom: each costs the driver a little"
    assert ["report" in told for told in often.heard] == [False, False, False, True] * 2
    alive, reports = often.heard[0], [TaskReport.model_validate_json(often.heard[at]["report"]) for at in (3, 7)]
    assert list(alive) == ["acc/seen"], "the one metric without which Tune refuses a report"
    assert [without_times(r) for r in reports] == [without_times(r) for r in whole.reports]


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


@pytest.mark.parametrize("gpus", [0, 0.5])
def test_a_trial_of_device_auto_trains_on_a_gpu_if_it_asks_for_one(tiny_sweep, tmp_path, gpus):
    base = override(tiny_sweep.base, {"device": "auto", "data.tasks": 2})
    changes = {"base": base, "resources": Resources(gpus_per_worker=gpus)}
    settings = StudySearcher(Ledger(tiny_sweep.model_copy(update=changes), tmp_path), Anywhere()).suggest("a")
    with simulated_gpu() as gpu:
        learn({**settings, "tasks": 1}, MemorySession())
        assert (gpu.count.kernels > 0) == (gpus > 0)


@pytest.mark.parametrize(
    ("device", "gpus", "placed"), [("auto", 0, "cpu"), ("auto", 1, "auto"), ("cuda", 0, "cuda"), ("cpu", 1, "cpu")]
)
def test_a_config_is_the_same_on_the_device_that_its_resources_mean(tiny_sweep, device, gpus, placed):
    config = override(tiny_sweep.base, {"device": device})
    on_device = Resources(gpus_per_worker=gpus).on_device(config)
    assert (on_device.device, config_hash(on_device)) == (placed, config_hash(config))


# What is kept of a trial is damaged.


def flip(folder, file):
    (path,) = folder.glob(file)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def put_a_folder(folder, file):
    (path,) = folder.glob(file)
    path.unlink()
    path.mkdir()


def drop_a_tensor(folder, _):
    state = load_state(folder)
    save_state(
        state._replace(classifier={name: t for name, t in state.classifier.items() if name != "heads.0.bias"}), folder
    )


DAMAGES = [(damage, file) for damage in (flip, put_a_folder) for file in ("state.json", "tensors-*")]


@pytest.mark.parametrize(("damage", "file"), [*DAMAGES, (drop_a_tensor, "")])
def test_a_trial_whose_state_is_damaged_begins_again_says_so_and_ends_with_the_same_numbers(
    damage, file, tiny_sweep, tmp_path, monkeypatch
):
    config = override(tiny_sweep.base, {"data.tasks": 2, "adapter": "none"})
    save_state(next(run(config)).state, tmp_path)
    damage(tmp_path, file)
    whole, heard = MemorySession(), []
    learn(settings_of(config), whole)
    monkeypatch.setattr("ray.tune.report", heard.append)
    learn(settings_of(config, tasks_done=1), InlineSession(SharedFolder(str(tmp_path.parent)), tmp_path.name))
    notice, *reports = heard
    assert str(tmp_path) in notice["notice"] or "heads.0.bias is missing" in notice["notice"]
    ended = [TaskReport.model_validate_json(metrics["report"]) for metrics in reports]
    assert [without_times(r) for r in ended] == [without_times(r) for r in whole.reports]
    assert same_state(load_state(tmp_path), whole.state)


def listed(*names, latest=None, **changes):
    """Train's list of these checkpoints."""
    empty = ("pending_training_results", "pending_validation_specs", "validated_checkpoint_dir_names")
    empty += ("timed_out_validation_checkpoint_dir_names", "failed_validation_checkpoint_dir_names")
    kept = {"checkpoint_results": [{"checkpoint_dir_name": name, "metrics": {}} for name in names]}
    kept |= {"checkpoint_report_indices": list(range(len(names))), "latest_checkpoint_result": latest}
    return json.dumps({**dict.fromkeys(empty, ()), "current_report_index": 1, **kept, **changes})


LISTS = {
    "whole": (listed("first"), True),
    "empty": (listed(), True),
    "torn": (listed("first")[:40], False),
    "nothing": ("", False),
    "of another shape": ("[]", False),
    "other fields": ('{"checkpoint_results": []}', False),
    "of what is gone": (listed("first", "second"), False),
    "places missing": (listed("first", checkpoint_report_indices=[]), False),
    "latest elsewhere": (listed("first", latest={"checkpoint_dir_name": "../x", "metrics": {}}), False),
    "deep": ("[" * 100_000, False),
}


@pytest.mark.parametrize(("snapshot", "kept"), LISTS.values(), ids=LISTS)
def test_a_trial_whose_list_of_checkpoints_is_not_whole_begins_anew(tmp_path, snapshot, kept):
    folder = tmp_path / "tiny-0000"
    (folder / "first").mkdir(parents=True)
    (folder / "checkpoint_manager_snapshot.json").write_text(snapshot)
    assert (forget_if_torn(SharedFolder(str(tmp_path)), folder.name) == "") == kept
    assert folder.exists() == kept
    assert forget_if_torn(SharedFolder(str(tmp_path)), "tiny-0001") == ""  # has kept nothing yet


@pytest.mark.parametrize("is_away", [True, False])
def test_a_controller_that_dies_as_it_begins_waits_for_a_place_that_is_away(tmp_path, monkeypatch, is_away):
    """What it reads there fails, and Ray tells of an actor that died."""
    folder, away, tries = tmp_path / "trials", tmp_path / "away", []
    folder.mkdir()

    class Dies:
        def __init__(self, *_, **__):
            pass

        def fit(self):
            tries.append(time.monotonic())
            if len(tries) == 1:
                if is_away:
                    folder.rename(away)
                    threading.Timer(1.0, away.rename, [folder]).start()
                raise ActorDiedError

    monkeypatch.setattr(driver, "Trainer", Dies)
    monkeypatch.setattr(driver, "TuneReportCallback", UserCallback)  # Tune's own is for trials of Tune's
    trial = driver.train_driver(Resources(), "cpu", str(folder), beside=False)
    settings = {"name": "tiny-0000", "gpus": 0, "avoid": []}
    if not is_away:
        with pytest.raises(ActorDiedError):
            trial(settings)
    else:
        trial(settings)
        assert tries[1] - tries[0] > 0.9
