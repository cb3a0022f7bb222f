"""The place that all nodes see, a folder or a bucket: the study's copy, and what of the trials stays in it."""

import pytest

from inflora.config import ConfigError, DataSettings
from inflora.data import ensure_store, read_manifest
from inflora.storage import SharedFolder
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.records import trial_name
from sweeps.engine.ledger.snapshot import fetch_database, keep_database
from sweeps.engine.ledger.study import STUDY_FILE
from sweeps.engine.run.nodes import likeness, require_like_driver
from sweeps.engine.run.preflight import TRIALS
from sweeps.engine.run.storage import CheckpointCleanup
from sweeps.engine.space.spec import Sweep

from .conftest import learn_all


@pytest.fixture(params=["folder", "bucket"])
def shared(request, tmp_path):
    root = str(tmp_path / "shared") if request.param == "folder" else request.getfixturevalue("bucket")
    return SharedFolder(f"{root}/sweeps/{tmp_path.name}")


def test_what_is_written_is_read_until_it_is_deleted(shared):
    assert shared.read("file") is None
    shared.write("file", b"one")
    shared.write("file", b"two")
    assert shared.read("file") == b"two"
    shared.delete("file")
    assert shared.read("file") is None


def test_a_driver_without_the_study_gets_it_back(shared, tiny_sweep, tmp_path):
    ledger = Ledger(tiny_sweep, tmp_path / "head")
    learn_all(ledger, ledger.propose().number, [0.9, 0.8, 0.7, 0.6, 0.5])
    keep_database(tmp_path / "head" / STUDY_FILE, shared)  # while the ledger has it open

    assert fetch_database(tmp_path / "new-head" / STUDY_FILE, shared)
    assert Ledger(tiny_sweep, tmp_path / "new-head").records() == ledger.records()


def test_a_study_that_is_there_is_not_replaced(shared, tiny_sweep, tmp_path):
    ledger = Ledger(tiny_sweep, tmp_path)
    keep_database(tmp_path / STUDY_FILE, shared)
    learn_all(ledger, ledger.propose().number, [0.9, 0.8, 0.7, 0.6, 0.5])
    assert not fetch_database(tmp_path / STUDY_FILE, shared)
    assert len(Ledger(tiny_sweep, tmp_path).records()) == 1


def keep_state(place, sweep, number, size=1000):
    SharedFolder(f"{place.address}/{TRIALS}/{trial_name(sweep.study_name, number)}").write("state", bytes(size))


def kept(place):
    return {int(name[-4:]) for name in place.folders(TRIALS)}


def test_only_the_best_ended_trials_state_and_those_of_running_ones_stay(shared, tiny_sweep, tmp_path):
    sweep = tiny_sweep.model_copy(update={"early_stopping": "none"})
    ledger = Ledger(sweep, tmp_path)
    housekeeping = CheckpointCleanup(ledger, shared)
    for _ in range(4):
        keep_state(shared, sweep, ledger.propose().number)
    housekeeping.tidy()
    assert kept(shared) == {0, 1, 2, 3}
    learn_all(ledger, 0, [0.7] * 5)
    learn_all(ledger, 1, [0.8] * 5)
    ledger.fail(2, "FloatingPointError")
    housekeeping.on_trial_complete(0, [], None)
    assert kept(shared) == {1, 3}
    ledger.fail(3, "ActorDiedError: it comes back")
    housekeeping.on_trial_error(0, [], None)
    assert kept(shared) == {1, 3}, "what is tried again goes on from its state"
    assert shared.bytes_in(TRIALS) == 2000, "nothing of the others is left behind"


def test_a_sweep_that_needs_more_room_than_it_has_ends_and_says_so(shared, tiny_sweep, tmp_path):
    sweep = Sweep.model_validate(tiny_sweep.model_dump() | {"budget": {"storage_gb": 1e-6}})
    ledger = Ledger(sweep, tmp_path)
    number = ledger.propose().number
    keep_state(shared, sweep, number, size=999)
    CheckpointCleanup(ledger, shared).tidy()
    assert ledger.why_over() == ""
    keep_state(shared, sweep, number, size=2000)
    CheckpointCleanup(ledger, shared).tidy()
    assert ledger.why_over().startswith("storage budget spent")
    assert ledger.propose() is None


def test_an_address_that_is_neither_is_refused():
    with pytest.raises(ConfigError, match=r"must be a folder or s3://bucket/path, got 'carrier://pigeon'"):
        SharedFolder("carrier://pigeon")


def test_a_relative_folder_is_the_one_seen_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert SharedFolder("shared").address == str(tmp_path / "shared")


def test_a_node_with_other_code_or_data_does_not_work(data_root):
    data = DataSettings(dataset="digits", tasks=5)
    ours = likeness(data, read_manifest(ensure_store("digits")).content_hash)
    require_like_driver(ours)
    with pytest.raises(ConfigError, match=r"has inflora-sweeps 0\.1\.0\+\w{8}, the driver 0\.0\.1: install the same"):
        require_like_driver(ours._replace(code="0.0.1"))
    with pytest.raises(ConfigError, match=r"digits holds other data \(\w{12}\) than the driver's \(abc\): prepare the"):
        require_like_driver(ours._replace(dataset_hash="abc"))
