"""The place that all nodes see, a folder or a bucket: the study's copy, and what of the trials stays in it."""

import contextlib
import pkgutil
import shutil
import threading
from itertools import islice
from pathlib import Path

import pytest

from inflora.config import ConfigError, DataSettings
from inflora.continual import run
from inflora.state import save_state
from inflora.storage import SharedFolder
from sweeps.engine.ledger.database import STUDY_FILE
from sweeps.engine.ledger.lease import leased, require_ours
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.records import old_trial_name
from sweeps.engine.ledger.snapshot import fetch_database, keep_database
from sweeps.engine.run.cluster import Cluster
from sweeps.engine.run.nodes import likeness, require_like_driver
from sweeps.engine.run.preflight import TRIALS, trials_place
from sweeps.engine.run.runner import locked
from sweeps.engine.run.session import InlineSession
from sweeps.engine.run.storage import Housekeeping, begun_anew, copy_study, copy_study_at_last, state_of, take_newer
from sweeps.engine.run.tune import StudySearcher
from sweeps.engine.space.spec import Sweep
from tests.conftest import same_state

from .conftest import Anywhere, hold, learn_all


@pytest.fixture(params=["folder", "bucket"])
def shared(request, tmp_path):
    root = str(tmp_path / "shared") if request.param == "folder" else request.getfixturevalue("bucket")
    return hold(SharedFolder(f"{root}/sweeps/{tmp_path.name}"))


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


def begin(sweep, folder) -> Ledger:
    """A sweep in its folder, as its driver begins it."""
    with locked(sweep, folder):
        return Ledger(sweep, folder)


def keep_state(place, ledger, number, size=1000):
    name = state_of(ledger.sweep, ledger.record_of(number))
    SharedFolder(f"{place.address}/{TRIALS}/{name}").write("state", bytes(size))


def kept(place):
    return {int(name.split("-")[2]) for name in place.folders(TRIALS)}


def test_only_the_best_ended_trials_state_and_those_of_running_ones_stay(shared, tiny_sweep, tmp_path):
    sweep = tiny_sweep.model_copy(update={"early_stopping": "none"})
    ledger = begin(sweep, tmp_path)
    housekeeping = Housekeeping(ledger, tmp_path, shared)
    for _ in range(4):
        keep_state(shared, ledger, ledger.propose().number)
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
    ledger = begin(sweep, tmp_path)
    number = ledger.propose().number
    keep_state(shared, ledger, number, size=999)
    Housekeeping(ledger, tmp_path, shared).tidy()
    assert ledger.why_over() == ""
    keep_state(shared, ledger, number, size=2000)
    Housekeeping(ledger, tmp_path, shared).tidy()
    assert ledger.why_over().startswith("storage budget spent")
    assert ledger.propose() is None


def test_an_address_that_is_neither_is_refused():
    with pytest.raises(ConfigError, match=r"must be a folder or s3://bucket/path, got 'carrier://pigeon'"):
        SharedFolder("carrier://pigeon")


def test_a_relative_folder_is_the_one_seen_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert SharedFolder("shared").address == str(tmp_path / "shared")
    assert SharedFolder(f"file://{tmp_path}/shared").address == str(tmp_path / "shared")
    with pytest.raises(ConfigError, match="must be a folder or s3://bucket/path"):
        SharedFolder("file://machine/shared")


def test_a_node_with_other_code_or_data_does_not_work(data_root):
    data = DataSettings(dataset="digits", tasks=5)
    ours = likeness(data)
    require_like_driver(ours)
    with pytest.raises(ConfigError, match=r"has inflora-sweeps [\d.]+\+\w{8}, the driver 0\.0\.1: install the same"):
        require_like_driver(ours._replace(code="0.0.1"))
    with pytest.raises(ConfigError, match=r"its digits is of other content \(\w{12}\) than the driver's \(abc\)"):
        require_like_driver(ours._replace(dataset_hash="abc"))


ACCURACIES = [0.9, 0.8, 0.7, 0.6, 0.5]


def test_a_head_that_another_has_gone_on_for_takes_its_study(shared, tiny_sweep, tmp_path):
    old, new = tmp_path / "head", tmp_path / "new-head"
    begin(tiny_sweep, old)
    copy_study(old, shared)
    assert not take_newer(tiny_sweep, old, shared)
    assert fetch_database(new / STUDY_FILE, shared)
    ledger = begin(tiny_sweep, new)
    learn_all(ledger, ledger.propose().number, ACCURACIES)
    assert not take_newer(tiny_sweep, new, shared), "the copy has less"
    copy_study(new, shared)
    assert not take_newer(tiny_sweep, new, shared)
    assert take_newer(tiny_sweep, old, shared)
    assert begin(tiny_sweep, old).records() == ledger.records()


def test_a_head_does_not_write_over_the_study_of_another_where_both_have_gone_on(shared, tiny_sweep, tmp_path):
    heads = [tmp_path / "head", tmp_path / "new-head"]
    ledgers = [begin(tiny_sweep, head) for head in heads]
    for trials, ledger in enumerate(ledgers, start=1):
        for _ in range(trials):
            learn_all(ledger, ledger.propose().number, ACCURACIES)
    copy_study(heads[1], shared)
    before = ledgers[0].records()
    with pytest.raises(ConfigError, match=r"another head has gone on with the study in .*: of trials \[1\]"):
        take_newer(tiny_sweep, heads[0], shared)
    assert begin(tiny_sweep, heads[0]).records() == before


def test_a_head_that_has_lost_its_last_writes_with_its_power_goes_on_from_the_copy(shared, tiny_sweep, tmp_path):
    """What the disk has is an older database, with the log of its last changes beside it."""
    head, disk = tmp_path / "head", tmp_path / "disk"
    ledger = begin(tiny_sweep, head)
    learn_all(ledger, ledger.propose().number, ACCURACIES)
    running = ledger.propose().number
    disk.mkdir()
    for file in head.glob(f"{STUDY_FILE}*"):
        shutil.copy(file, disk)
    assert (disk / f"{STUDY_FILE}-wal").stat().st_size > 0
    learn_all(ledger, running, ACCURACIES)
    copy_study(head, shared)
    assert take_newer(tiny_sweep, disk, shared)
    assert begin(tiny_sweep, disk).records() == ledger.records()


def test_a_damaged_copy_does_not_keep_a_sweep_from_going_on(shared, tiny_sweep, tmp_path):
    begin(tiny_sweep, tmp_path)
    copy_study(tmp_path, shared)
    shared.write(STUDY_FILE, b"no database")
    assert not take_newer(tiny_sweep, tmp_path, shared)


# Names of states hold the settings.


def names_of(sweep, folder):
    ledger = begin(sweep, folder)
    return {StudySearcher(ledger, Anywhere()).suggest(str(number))["name"] for number in range(2)}


def test_a_number_that_another_head_gives_to_other_settings_finds_no_state(tiny_sweep, tmp_path):
    sweep = tiny_sweep.model_copy(update={"sampler": "random"})
    before = names_of(sweep, tmp_path / "head")
    assert names_of(sweep, tmp_path / "new-head") == before, "the same settings, the same states"
    other = names_of(sweep.model_copy(update={"sampler_seed": 1}), tmp_path / "other-head")
    assert len(other & before) == 1, "of the recipe's first trial alone"
    assert {name.rpartition("-")[0] for name in other} == {name.rpartition("-")[0] for name in before}


def test_states_without_their_settings_are_begun_anew_and_all_but_the_bests_deleted(shared, tiny_sweep, tmp_path):
    ledger = begin(tiny_sweep.model_copy(update={"early_stopping": "none"}), tmp_path)
    for number in range(3):
        assert ledger.propose().number == number
        SharedFolder(f"{shared.address}/{TRIALS}/{old_trial_name(tiny_sweep.study_name, number)}").write("state", b"")
    SharedFolder(f"{shared.address}/{TRIALS}/another-0000").write("state", b"")
    learn_all(ledger, 0, [0.8] * 5)
    learn_all(ledger, 1, [0.7] * 5)
    assert begun_anew(ledger.sweep, ledger.records(), shared) == [2]
    Housekeeping(ledger, tmp_path, shared).tidy()
    assert shared.folders(TRIALS) == {old_trial_name(tiny_sweep.study_name, 0), "another-0000"}


# The place is away.


def take_away(place):
    """As a file system that fails: what asks for anything in it hears an error, what looks sees nothing."""
    folder = Path(place.address)
    folder.rename(folder.with_suffix(".away"))
    folder.write_text("")


def bring_back(place):
    folder = Path(place.address)
    folder.unlink()
    folder.with_suffix(".away").rename(folder)


@pytest.fixture
def folder(tmp_path):
    place = hold(SharedFolder(str(tmp_path / "shared")))
    place.make(TRIALS)
    return place


def test_a_place_that_is_away_costs_housekeeping_nothing_and_is_caught_up_with(folder, tiny_sweep, tmp_path, caplog):
    ledger = begin(tiny_sweep.model_copy(update={"early_stopping": "none"}), tmp_path / "head")
    housekeeping = Housekeeping(ledger, tmp_path / "head", folder)
    for _ in range(3):
        keep_state(folder, ledger, ledger.propose().number)
    take_away(folder)
    learn_all(ledger, 0, [0.8] * 5)
    housekeeping.on_trial_complete(0, [], None)
    learn_all(ledger, 1, [0.7] * 5)
    housekeeping.on_trial_error(0, [], None)
    assert len([line for line in caplog.messages if "cannot be looked after now" in line]) == 1, "said once"
    bring_back(folder)
    assert (kept(folder), folder.read(STUDY_FILE)) == ({0, 1, 2}, None)
    housekeeping.tidy()
    assert kept(folder) == {0, 2}
    assert fetch_database(tmp_path / "new-head" / STUDY_FILE, folder)
    assert Ledger(tiny_sweep, tmp_path / "new-head").records() == ledger.records()


def test_no_state_is_deleted_before_the_copy_of_the_study_knows_the_trials_end(folder, tiny_sweep, tmp_path):
    """The copy cannot be written, the states could be deleted."""
    ledger = begin(tiny_sweep.model_copy(update={"early_stopping": "none"}), tmp_path / "head")
    for accuracy in (0.7, 0.8):
        keep_state(folder, ledger, number := ledger.propose().number)
        learn_all(ledger, number, [accuracy] * 5)
    (Path(folder.address) / STUDY_FILE).mkdir()
    Housekeeping(ledger, tmp_path / "head", folder).tidy()
    assert kept(folder) == {0, 1}
    (Path(folder.address) / STUDY_FILE).rmdir()
    Housekeeping(ledger, tmp_path / "head", folder).tidy()
    assert kept(folder) == {1}


def test_the_last_copy_waits_for_the_place_and_what_it_waits_for_is_said(folder, tiny_sweep, tmp_path):
    ledger = begin(tiny_sweep, tmp_path / "head")
    take_away(folder)
    said: list[str] = []
    back = threading.Timer(2, lambda: bring_back(folder))
    back.start()
    copy_study_at_last(tmp_path / "head", folder, said.append)
    back.join()
    (line,) = said
    assert line.startswith(f"the study cannot be copied to {folder.address}: ")
    assert fetch_database(tmp_path / "new-head" / STUDY_FILE, folder)
    assert Ledger(tiny_sweep, tmp_path / "new-head").records() == ledger.records()


def test_a_last_copy_that_cannot_be_made_is_said(folder, tiny_sweep, tmp_path, monkeypatch):
    monkeypatch.setattr("sweeps.engine.run.storage.LAST_COPY_PATIENCE_S", 0.5)
    begin(tiny_sweep, tmp_path / "head")
    take_away(folder)
    said: list[str] = []
    copy_study_at_last(tmp_path / "head", folder, said.append)
    assert f"the study in {folder.address} is not as this sweep has ended" in said[-1]
    assert str(tmp_path / "head") in said[-1]


def test_a_state_is_kept_when_the_place_is_back(folder, tiny_sweep, monkeypatch):
    state = next(run(tiny_sweep.base)).state
    reported: list[dict] = []
    monkeypatch.setattr("ray.tune.report", reported.append)
    session = InlineSession(folder, "trial")
    take_away(folder)
    back = threading.Timer(2, lambda: bring_back(folder))
    back.start()
    session.report({"acc/seen": 1.0}, state)
    assert back.finished.is_set() and len(reported) == 1
    assert same_state(session.restore(), state)


def test_a_state_in_a_place_that_is_away_is_waited_for_and_not_called_missing(folder, tiny_sweep, monkeypatch):
    state = next(run(tiny_sweep.base)).state
    save_state(state, Path(folder.address) / "trial")
    take_away(folder)
    threading.Timer(2, lambda: bring_back(folder)).start()
    assert same_state(InlineSession(folder, "trial").restore(), state)


def test_a_place_that_stays_away_ends_what_waits_for_it(folder):
    take_away(folder)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        folder.when_there(lambda: None, patience_s=0.5)


def test_a_sweep_that_has_begun_waits_for_its_place_and_one_that_has_not_is_refused(tiny_sweep, tmp_path):
    """A driver that is started again, on another machine perhaps, where the place is not mounted yet."""
    cluster = Cluster(shared=str(tmp_path / "shared"))
    folder = SharedFolder(f"{cluster.shared}/{tiny_sweep.name}")
    folder.make(TRIALS)
    Ledger(tiny_sweep, tmp_path / "begun").note_place(folder.address)
    take_away(folder)
    with pytest.raises(ConfigError, match=f"cannot write into {folder.address}"), leased(folder, print):
        pass
    said: list[str] = []
    back = threading.Timer(2, lambda: bring_back(folder))
    back.start()
    place, _ = trials_place(tiny_sweep, tmp_path / "begun", cluster)
    assert back.finished.is_set() and place.address == folder.address
    take_away(folder)
    threading.Timer(1, lambda: bring_back(folder)).start()
    with leased(place, said.append, patience_s=20):
        require_ours(place)
    assert said[0].startswith(f"waiting for {place.address}: ")


class StoppedError(Exception):
    """What ends a machine, here only a call."""


@pytest.mark.parametrize("written", range(2))
def test_a_trial_whose_machine_goes_while_a_state_is_kept_goes_on_from_the_state_before(
    shared, tiny_sweep, monkeypatch, written
):
    shared.make("trial")
    before, after = (result.state for result in islice(run(tiny_sweep.base), 2))
    monkeypatch.setattr("ray.tune.report", lambda metrics: None)
    session = InlineSession(shared, "trial")
    assert session.restore() is None
    session.report({"acc/seen": 1.0}, before)
    left = iter(range(written))

    def stop(*_):
        if next(left, None) is None:
            raise StoppedError

    for place in ("inflora.state.write_atomically", "inflora.storage.SharedFolder.write"):
        original = pkgutil.resolve_name(place)
        monkeypatch.setattr(place, lambda *given, do=original: (stop(), do(*given)))
    with contextlib.suppress(StoppedError):
        session.report({"acc/seen": 1.0}, after)
    monkeypatch.undo()
    monkeypatch.setattr("ray.tune.report", lambda metrics: None)
    kept = InlineSession(shared, "trial").restore()
    assert same_state(kept, before)
    InlineSession(shared, "trial").report({"acc/seen": 1.0}, after)
    assert same_state(InlineSession(shared, "trial").restore(), after)
    session.forget()
    assert InlineSession(shared, "trial").restore() is None
