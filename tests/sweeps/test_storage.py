"""The place that all nodes see: a folder or a bucket, and the study's copy in it."""

import pytest

from inflora.config import ConfigError
from sweeps.engine.ledger import STUDY_FILE, Ledger
from sweeps.engine.nodes import code_version, require_code
from sweeps.engine.storage import SharedFolder, fetch_database, keep_database

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


def test_an_address_that_is_neither_is_refused():
    with pytest.raises(ConfigError, match=r"must be a folder or s3://bucket/path, got 'carrier://pigeon'"):
        SharedFolder("carrier://pigeon")


def test_a_relative_folder_is_the_one_seen_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert SharedFolder("shared").address == str(tmp_path / "shared")


def test_a_node_with_other_code_does_not_work():
    require_code(code_version())
    with pytest.raises(ConfigError, match=r"has inflora-sweeps 0\.1\.0\+\w{8}, the driver 0\.0\.1: install the same"):
        require_code("0.0.1")
