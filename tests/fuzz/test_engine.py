"""Whatever lies where a sweep's files should: a right answer, or one line that says what cannot be read."""

import contextlib
import io
import json
import pickle
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sweeps.cli import app
from sweeps.engine.ledger.database import STUDY_FILE
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.records import TrialRecord
from sweeps.engine.ledger.study import load_study
from sweeps.engine.ledger.trials import read_records
from sweeps.engine.show.mirror import Mirror
from sweeps.engine.space.domains import Choice
from sweeps.engine.space.spec import SPEC_FILE, Constraint, Sweep, read_sweep
from tests.fuzz.answers import answered
from tests.sweeps.conftest import learn_all, report, tiny_sweep

pytestmark = pytest.mark.fuzz
__all__ = ["tiny_sweep"]


@pytest.fixture(scope="module")
def kept(tiny_sweep, tmp_path_factory) -> Path:
    """The folder of a sweep with trials that finished, were stopped, failed or were interrupted."""
    folder = tmp_path_factory.mktemp("kept")
    changes = {"trials": 9, "constraints": [Constraint(metric="acc/final", at_least=0.55)]}
    sweep = Sweep.model_validate({**dict(tiny_sweep), **changes})
    ledger = Ledger(sweep, folder)
    for accuracy in (0.9, 0.5, 0.8):
        learn_all(ledger, ledger.propose().number, [accuracy] * 5)
    stopped, failed, running = (ledger.propose().number for _ in range(3))
    learn_all(ledger, stopped, [0.2, 0.1])
    ledger.fail(failed, "FloatingPointError: the loss is nan")
    ledger.report(running, report(1, 0.85))
    ledger.study._storage.remove_session()
    ledger.study._storage._backend.engine.dispose()
    (folder / SPEC_FILE).write_text(sweep.model_dump_json())
    Mirror(sweep, folder, f"sqlite:///{folder / 'mlflow.db'}", {"dataset": "digits"}).sync()
    return folder


FILES = (SPEC_FILE, STUDY_FILE, "mlflow.db")


def copy_of(kept: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in FILES:
        shutil.copy(kept / name, folder)
    return folder


def content(folder: Path) -> dict[str, bytes | None]:
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


def read(folder: Path) -> list[TrialRecord] | str:
    """The sweep's trials, or the one line in their place; the folder stays as it is."""
    before = content(folder)
    told = answered(lambda: read_records(load_study(read_sweep(folder), folder)))
    assert content(folder) == before, "who reads does not write"
    return told


@pytest.fixture(scope="module")
def known(kept) -> list[TrialRecord]:
    """What the whole study tells."""
    return without_dates(read(kept))


def without_dates(records: list[TrialRecord]) -> list[TrialRecord]:
    """What is shown: when a trial began and ended only orders it."""
    return [record._replace(start_ms=0, end_ms=None) for record in records]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(at=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
def test_a_byte_of_the_study_is_changed(kept, known, tmp_path_factory, at, value):
    folder = copy_of(kept, tmp_path_factory.getbasetemp() / "byte")
    study = bytearray((folder / STUDY_FILE).read_bytes())
    study[int(at * len(study))] ^= value
    (folder / STUDY_FILE).write_bytes(study)
    told = read(folder)
    assert isinstance(told, str) or without_dates(told) == known


TEXTS = [
    ("trial_user_attributes", "value_json"),
    ("trial_user_attributes", "key"),
    ("trial_params", "distribution_json"),
    ("trial_params", "param_name"),
    ("trial_params", "param_value"),
    ("trial_values", "value"),
    ("trials", "state"),
    ("trials", "number"),
    ("studies", "study_name"),
    ("study_directions", "direction"),
    ("study_user_attributes", "value_json"),
    ("trial_system_attributes", "value_json"),
    ("version_info", "schema_version"),
    ("alembic_version", "version_num"),
]
VALUES = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(max_size=20),
    st.binary(max_size=20),
    st.sampled_from(['"text"', "[1, 2]", '{"value": 1, "crc32": 0}', "{}", "null", "NaN", "[" * 3000, "9" * 5000]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(where=st.sampled_from(TEXTS), row=st.integers(0, 30), value=VALUES)
def test_a_value_of_the_study_is_another(kept, known, tmp_path_factory, where, row, value):
    folder, (table, column) = copy_of(kept, tmp_path_factory.getbasetemp() / "value"), where
    with closing(sqlite3.connect(folder / STUDY_FILE)) as database, contextlib.suppress(sqlite3.IntegrityError):
        rows = [each for (each,) in database.execute(f"SELECT rowid FROM {table}")]
        database.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (value, rows[row % len(rows)]))
        database.commit()
    told = read(folder)
    assert isinstance(told, str) or without_dates(told) == known


def test_trials_of_the_same_number_are_no_study(kept, tmp_path):
    folder = copy_of(kept, tmp_path / "numbers")
    with closing(sqlite3.connect(folder / STUDY_FILE)) as database:
        database.execute("UPDATE trials SET number = 0")
        database.commit()
    assert "not numbered one after another" in read(folder)


SHAPES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(name=st.integers(0, 40), value=SHAPES, inside=st.booleans())
def test_a_field_of_the_sweep_has_another_shape(kept, tmp_path_factory, name, value, inside):
    folder = copy_of(kept, tmp_path_factory.getbasetemp() / "shape")
    spec = json.loads((folder / SPEC_FILE).read_text())
    part = spec[sorted(spec)[name % len(spec)]] if inside else spec
    if isinstance(part, dict) and part:
        part[sorted(part)[name % len(part)]] = value
    (folder / SPEC_FILE).write_text(json.dumps(spec))
    read(folder)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(at=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
def test_a_byte_of_the_sweep_is_changed(kept, tmp_path_factory, at, value):
    folder = copy_of(kept, tmp_path_factory.getbasetemp() / "spec")
    spec = bytearray((folder / SPEC_FILE).read_bytes())
    spec[int(at * len(spec))] ^= value
    (folder / SPEC_FILE).write_bytes(spec)
    read(folder)


def command(*line: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        app(list(line))
    return int(ended.value.code or 0), out.getvalue(), err.getvalue()


def nothing(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def latin(path: Path) -> None:
    path.write_bytes("Übung".encode("latin-1"))


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def another_database(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE trials (x)")


@pytest.mark.parametrize("damage", [nothing, a_folder, empty, latin, half, another_database])
@pytest.mark.parametrize("file", [SPEC_FILE, STUDY_FILE])
@pytest.mark.parametrize(
    "line", ["status {}", "report {} -o {}/out.csv", "export {} -o {}/out.yaml", "final {} --out {}/f"]
)
def test_every_command_that_reads_says_in_one_line_what_it_cannot(kept, tmp_path, line, file, damage):
    folder = copy_of(kept, tmp_path / "kept")
    damage(folder / file)
    before = content(folder)
    code, out, err = command(*line.replace("{}", str(folder)).split())
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("error: ")
    assert content(folder) == before, "a refused command leaves nothing"


@pytest.mark.parametrize("damage", [nothing, a_folder, empty, latin, half, another_database])
def test_a_damaged_tracking_store_costs_an_export_one_line_at_most(kept, tmp_path, damage):
    folder = copy_of(kept, tmp_path / "kept")
    damage(folder / "mlflow.db")
    before = content(folder)
    code, _, err = command("export", str(folder), "-o", str(tmp_path / "best.yaml"))
    assert code == 0
    assert len(err.splitlines()) <= 1
    assert content(folder) == before


class Planted:
    """Tells when it is unpickled."""

    opened = False

    def __reduce__(self) -> tuple:
        return setattr, (Planted, "opened", True)


@pytest.mark.parametrize("rank", [None, Choice(options=(4, 8))], ids=["numbers", "with a choice"])
def test_a_study_from_elsewhere_runs_nothing(tiny_sweep, tmp_path, rank):
    space = dict(tiny_sweep.space) | ({"adapter.rank": rank} if rank else {})
    changes = {"sampler": "cmaes", "early_stopping": "none", "trials": 12, "space": space, "first": ()}
    sweep = Sweep.model_validate({**dict(tiny_sweep), **changes})
    ledger = Ledger(sweep, tmp_path)
    for _ in range(5):
        learn_all(ledger, ledger.propose().number, [0.5] * 5)
    for trial in ledger.study.get_trials():
        for key in ("cma:optimizer:0", "cmawm:optimizer:0", "sepcma:optimizer:0"):
            with closing(sqlite3.connect(tmp_path / STUDY_FILE)) as database:
                planted = json.dumps(pickle.dumps(Planted()).hex())
                row = (trial._trial_id, key, planted)
                database.execute(
                    "INSERT INTO trial_system_attributes (trial_id, key, value_json) VALUES (?, ?, ?)", row
                )
                database.commit()
    again = Ledger(sweep, tmp_path)
    for _ in range(4):
        learn_all(again, again.propose().number, [0.5] * 5)
    assert not Planted.opened
