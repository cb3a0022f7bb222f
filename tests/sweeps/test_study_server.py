"""A study on a database server: the same study, whoever drives the sweep and wherever that is."""

import random
import re
import shutil
import subprocess
import sys
import time

import pytest

from inflora.config import ConfigError
from sweeps.engine.ledger.database import checked_url, chosen_url, keep_url, study_url
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.records import Outcome
from sweeps.engine.ledger.study import load_study
from sweeps.engine.ledger.trials import read_records
from sweeps.engine.run.cluster import Cluster
from sweeps.engine.run.preflight import check_folder

from .conftest import Recipe, report, undisturbed
from .server import Postgres, needs_postgres

SERVER = "postgresql://lab@db.example/studies"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("nonsense", "--study is postgresql://user@host/database, got 'nonsense'"),
        ("sqlite:////tmp/study.db", "--study is postgresql://user@host/database, got"),
        ("mysql://lab@db.example/studies", "--study is postgresql://user@host/database, got"),
        ("postgresql://lab@db.example:54x/studies", "--study is postgresql://user@host/database, got"),
        ("postgresql://lab:secret@db.example:54x/studies", "got 'postgresql://lab:***@db.example:54x/studies'"),
        ("lab:secret@db.example/studies", "got 'lab:***@db.example/studies'"),
        ("postgresql://lab@db.example", "--study is postgresql://user@host/database, got"),
        ("postgresql://lab:secret@db.example/studies", "without a password: PGPASSWORD or ~/.pgpass has it"),
        ("postgresql://lab@db.example/studies?password=secret", "without a password"),
        ("postgresql://lab@db.example/studies?sslpassword=secret", "without a password"),
    ],
)
def test_an_address_is_that_of_a_database_on_a_server_and_holds_no_password(given, why):
    with pytest.raises(ConfigError) as refused:
        checked_url(given)
    assert why in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_sweep_goes_on_where_its_study_is(tmp_path):
    assert study_url(tmp_path) == chosen_url(tmp_path, None) == f"sqlite:///{tmp_path / 'study.db'}"
    assert chosen_url(tmp_path, SERVER) == SERVER
    keep_url(tmp_path, SERVER)
    assert study_url(tmp_path) == chosen_url(tmp_path, None) == chosen_url(tmp_path, SERVER) == SERVER
    with pytest.raises(ConfigError, match=f"is {SERVER}: it cannot go on in postgresql://lab@other/studies"):
        chosen_url(tmp_path, "postgresql://lab@other/studies")


def test_a_folder_from_elsewhere_that_names_another_kind_of_database_is_refused(tmp_path):
    (tmp_path / "study.url").write_text("sqlite:////etc/passwd\n")
    with pytest.raises(ConfigError, match="--study is postgresql://"):
        study_url(tmp_path)


def test_a_study_on_a_server_needs_a_place_that_other_heads_see_too(tiny_sweep, tmp_path):
    with pytest.raises(ConfigError, match="--study needs --shared"):
        check_folder(tiny_sweep, tmp_path, Cluster(study=SERVER))


def test_a_server_that_does_not_answer_is_one_line_and_nothing_is_made(tiny_sweep, tmp_path):
    nobody = "postgresql://lab@127.0.0.1:1/studies"
    with pytest.raises(ConfigError, match=f"^--study {nobody} (does not answer|needs a driver)"):
        check_folder(tiny_sweep, tmp_path / "new", Cluster(shared=str(tmp_path), study=nobody))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def server():
    database = Postgres()
    yield database
    database.remove()


def course(ledger: Ledger) -> list:
    """Trials that end in every way, by a course that chance has drawn."""
    chance, running = random.Random(3), {}
    for _ in range(40):
        if len(running) < 3 and (proposal := ledger.propose()) is not None:
            running[proposal.number] = proposal.tasks_done
        for number in [*running][:1]:
            running[number] += 1
            if chance.random() < 0.2:
                ledger.fail(number, "the node died")
                del running[number]
            elif ledger.report(number, report(running[number], chance.random())) or running[number] == 5:
                ledger.close(number)
                del running[number]
    return [record._replace(start_ms=0, end_ms=None) for record in ledger.records()]


@needs_postgres
@pytest.mark.cluster
def test_a_server_holds_what_a_file_would(tiny_sweep, tmp_path, server):
    sweep = tiny_sweep.model_copy(update={"name": "course", "trials": 8, "retries": 0, "give_up_after": 99})
    (tmp_path / "server").mkdir()
    keep_url(tmp_path / "server", server.uri)
    assert load_nothing(sweep, tmp_path / "server"), "reading makes no tables"
    in_file, on_server = (course(Ledger(sweep, tmp_path / name)) for name in ("file", "server"))
    assert on_server == in_file
    assert len({record.outcome for record in on_server}) > 1
    again = Ledger(sweep, tmp_path / "server")
    assert again.records() == read_records(load_study(sweep, tmp_path / "server"))
    assert not (tmp_path / "server" / "study.db").exists()


def load_nothing(sweep, folder) -> bool:
    with pytest.raises(ConfigError, match=f"has no study {sweep.study_name}"):
        load_study(sweep, folder)
    return True


@needs_postgres
@pytest.mark.cluster
def test_neither_a_server_that_crashes_nor_a_head_that_is_lost_changes_a_number(
    tiny_sweep, tmp_path, data_root, server
):
    """The first head's machine is gone with all its files; the second one's server crashes amid trials."""
    heads = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        heads.append(Recipe(tmp_path / name, tiny_sweep, data_root))
    place = tmp_path / "shared"
    options = ("--shared", str(place), "--study", server.uri, "--executor", "inline")
    first = heads[0].start(*options)
    heads[0].wait_for(r"task 2\b", first)
    first.kill()
    first.wait()
    shutil.rmtree(heads[0].results)

    without = heads[1].start("--shared", str(place), "--executor", "inline")
    assert without.wait(timeout=100) == 2
    assert f"is of a sweep whose study is {server.uri}, this one's is a file" in heads[1].log.read_text()
    elsewhere = heads[1].start("--shared", str(tmp_path / "else"), *options[2:])
    assert elsewhere.wait(timeout=100) == 2
    assert f"in {server.uri} are in {place}/tiny, not in {tmp_path}/else/tiny" in heads[1].log.read_text()

    second = heads[1].start(*options)
    heads[1].wait_for(r"task 1\b", second)
    server.stop()
    time.sleep(3)
    server.start()
    assert second.wait(timeout=200) == 0, heads[1].log.read_text()
    assert re.search("waiting for the study in|Tune has stopped", heads[1].log.read_text()), "it did without its study"
    records = read_records(load_study(tiny_sweep, heads[1].results))
    assert len(records) == tiny_sweep.trials
    for record in records:
        assert record.outcome in (Outcome.FINISHED, Outcome.PRUNED)
        learnt = [each.accuracies for each in record.reports]
        assert learnt == undisturbed(tiny_sweep, record.settings)[: len(learnt)]
    shown = subprocess.run(
        [sys.executable, "-m", "sweeps.cli", "status", str(place / "tiny")], capture_output=True, text=True, timeout=100
    )
    assert shown.returncode == 0 and "finished" in shown.stdout
