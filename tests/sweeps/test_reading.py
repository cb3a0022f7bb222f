"""What reads a sweep (status, export, report, warm starts) writes nothing, and reads the copy in the shared place."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from inflora.config import ConfigError, load_config
from inflora.storage import SharedFolder
from sweeps.engine.after.export import best_settings
from sweeps.engine.ledger.lease import LEASE_FILE, leased, this_process
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.reading import read_kept
from sweeps.engine.run.runner import locked
from sweeps.engine.run.storage import copy_study
from sweeps.engine.space.spec import SPEC_FILE

from .conftest import PAPER, hold, learn_all


@pytest.fixture
def head(tiny_sweep, tmp_path):
    """The folder of a sweep with a finished trial and one that its driver was killed in."""
    folder = tmp_path / "head" / "tiny"
    with locked(tiny_sweep, folder):
        ledger = Ledger(tiny_sweep, folder)
        learn_all(ledger, ledger.propose().number, [0.9, 0.8, 0.7, 0.6, 0.5])
        ledger.propose()
    return folder


@pytest.fixture(params=["folder", "bucket"])
def copied(request, head, tmp_path) -> SharedFolder:
    """Where the head has put its copy."""
    root = str(tmp_path / "shared") if request.param == "folder" else request.getfixturevalue("bucket")
    place = SharedFolder(f"{root}/{tmp_path.name}/tiny")
    copy_study(head, hold(place))
    place.delete(LEASE_FILE)
    return place


def sweeps(folder: Path, *line: str) -> subprocess.CompletedProcess:
    """Type a command in an empty folder, of which it may not make use."""
    return subprocess.run(
        [sys.executable, "-m", "sweeps.cli", *line], cwd=folder, capture_output=True, text=True, timeout=120
    )


def everything_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_the_copy_says_what_the_study_says(copied, head):
    theirs, ours = read_kept(copied.address), read_kept(str(head))
    assert theirs.sweep == ours.sweep
    assert [trial.user_attrs for trial in theirs.study.trials] == [trial.user_attrs for trial in ours.study.trials]
    assert not theirs.driven


def test_status_report_and_export_read_the_copy_and_write_nothing(copied, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    before = everything_in(tmp_path)
    status = sweeps(here, "status", copied.address)
    assert (status.returncode, status.stderr) == (0, "")
    assert "1 of 4 trials ended: 1 interrupted, 1 finished" in status.stdout
    assert "<h1>tiny</h1>" in sweeps(here, "report", copied.address, "-o", "-").stdout
    assert everything_in(tmp_path) == before
    assert sweeps(here, "report", copied.address, "-o", "table.csv").returncode == 0
    exported = sweeps(here, "export", copied.address, "-o", "best.yaml", "--tracking-uri", f"sqlite:///{here}/none.db")
    assert exported.returncode == 0, exported.stderr
    assert load_config(here / "best.yaml").provenance["observed"] == 0.5
    assert {path.name for path in here.iterdir()} == {"table.csv", "best.yaml"}
    assert {path: kept for path, kept in everything_in(tmp_path).items() if not path.startswith(str(here))} == before


@pytest.mark.parametrize("command", ["status", "report", "export"])
@pytest.mark.parametrize("there", ["nothing", "sweep.json"])
def test_what_is_not_there_is_one_line_and_is_not_made(command, there, tiny_sweep, tmp_path):
    """An empty study would keep a start from fetching the copy."""
    folder = tmp_path / "results" / "tiny"
    if there == "sweep.json":
        folder.mkdir(parents=True)
        (folder / SPEC_FILE).write_text(tiny_sweep.model_dump_json())
    before = sorted(tmp_path.rglob("*"))
    done = sweeps(tmp_path, command, "tiny")
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert "sweep.json is missing" in line if there == "nothing" else "study.db: it is not there" in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("address", ["s3://bucket/nowhere/tiny", "s3://no-such-bucket/tiny", "carrier://pigeon"])
def test_a_bucket_without_the_sweep_is_one_line(bucket, tmp_path, address):
    done = sweeps(tmp_path, "status", address)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert address in line
    assert list(tmp_path.iterdir()) == []


def test_a_copy_is_driven_while_its_driver_holds_the_place(copied):
    with leased(copied, print):
        assert read_kept(copied.address).driven
    assert not read_kept(copied.address).driven
    elsewhere = this_process().model_copy(update={"machine": "another"})
    for age_s, driven in ((0, True), (3600, False)):
        then = elsewhere.model_copy(update={"renewed_ms": int((time.time() - age_s) * 1000)})
        copied.write(LEASE_FILE, then.model_dump_json().encode())
        assert read_kept(copied.address).driven is driven


def test_a_warm_start_reads_the_copy(copied, tiny_sweep):
    assert best_settings(copied.address) == ([PAPER], tiny_sweep.study_name)


def test_a_bucket_that_does_not_answer_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("sweeps.engine.ledger.reading.PATIENCE_S", 1.0)
    with pytest.raises(ConfigError, match=r"^cannot read s3://bucket/tiny: "):
        read_kept("s3://bucket/tiny")
