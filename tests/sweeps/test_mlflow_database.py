"""The database that a sweep's runs are kept in is there as a whole or not at all."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from inflora.config import ConfigError
from sweeps.engine.show.mlflow_database import make_whole
from sweeps.engine.show.mlflow_store import make_client


def uri(file: Path) -> str:
    return f"sqlite:///{file}"


@pytest.fixture
def file(tmp_path) -> Path:
    """A whole database."""
    file = tmp_path / "mlflow.db"
    make_whole(uri(file))
    return file


def change(file: Path, *statements: str) -> None:
    with closing(sqlite3.connect(file)) as database, database:
        for statement in statements:
            database.execute(statement)


HALF = ("PRAGMA user_version = 0", "DROP TABLE evaluation_datasets", "UPDATE alembic_version SET version_num = 'older'")
"""What makes a whole database one whose making was stopped."""


def test_a_new_database_lies_alone_in_its_folder_and_works(file):
    assert [path.name for path in file.parent.iterdir()] == ["mlflow.db"]
    assert [each.name for each in MlflowClient(uri(file)).search_experiments()] == ["Default"]


def test_one_that_is_there_is_not_touched(file):
    before = file.read_bytes(), file.stat().st_ino
    make_whole(uri(file))
    assert (file.read_bytes(), file.stat().st_ino) == before


def test_one_that_mlflow_made_itself_is_kept_although_it_holds_no_runs_yet(file):
    change(file, "PRAGMA user_version = 0")
    MlflowClient(uri(file)).create_experiment("mine")
    before = file.stat().st_ino
    make_whole(uri(file))
    assert file.stat().st_ino == before


@pytest.mark.parametrize("more", [(), ("DROP TABLE experiments",), ("DELETE FROM alembic_version",)])
def test_one_that_was_stopped_in_its_making_is_made_anew(file, more):
    change(file, *HALF, *more)
    file.with_name(".mlflow.db.new").write_bytes(b"what a kill has left")
    file.with_name("mlflow.db-journal").write_bytes(bytes(600))
    make_whole(uri(file))
    assert [path.name for path in file.parent.iterdir()] == ["mlflow.db"]
    assert [each.name for each in MlflowClient(uri(file)).search_experiments()] == ["Default"]


def test_one_that_holds_anything_is_never_replaced_but_refused_in_one_line(file):
    change(file, *HALF, "INSERT INTO registered_models (name) VALUES ('mine')")
    before = file.read_bytes()
    make_whole(uri(file))
    assert file.read_bytes() == before
    with pytest.raises(ConfigError, match=r"MLflow cannot use .*move it away or choose another") as refused:
        make_client(uri(file))
    assert "\n" not in str(refused.value)


def test_what_is_no_database_is_named_and_kept(tmp_path):
    file = tmp_path / "mlflow.db"
    file.write_text("a letter to a friend, long enough to have a header")
    with pytest.raises(ConfigError, match=r"cannot use the MLflow database \S+mlflow.db: file is not a database"):
        make_whole(uri(file))
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


@pytest.mark.parametrize("other", ["http://127.0.0.1:5000", "postgresql://here/db", "sqlite:///:memory:", "no uri"])
def test_what_is_not_a_file_is_none_of_its_business(other, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_whole(other)
    assert not list(tmp_path.iterdir())
