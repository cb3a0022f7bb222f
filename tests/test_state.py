"""States on disk: whole or not there, written once where they do not change, damage noticed, nothing pickled."""

import json
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inflora import state as state_module
from inflora.config import override
from inflora.continual import TaskResult, run
from inflora.files import write_atomically
from inflora.gaussians import Gaussians
from inflora.state import RunState, StateError, has_state, load_state, save_state
from tests.conftest import pair_of, same_state


@pytest.fixture(scope="module")
def results(tiny) -> list[TaskResult]:
    """The first tasks of the tiny run, with classes' Gaussians to remember."""
    return list(islice(run(override(tiny, pair_of("inflora", "aligned"))), 4))


def files_of(folder: Path) -> list[Path]:
    """The files of tensors."""
    return sorted(folder.glob("tensors-*.safetensors"))


def names_in(file: Path) -> set[str]:
    """The tensors in a file, read without the library that wrote it."""
    content = file.read_bytes()
    return set(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])) - {"__metadata__"}


def test_a_state_is_loaded_as_it_was_saved(results, tmp_path):
    assert not has_state(tmp_path)
    save_state(results[2].state, tmp_path)
    assert has_state(tmp_path)
    assert same_state(load_state(tmp_path), results[2].state)


# What is written, and how often.


def test_each_tasks_classes_are_a_file_of_their_own_and_all_else_is_one(results, tmp_path):
    save_state(results[2].state, tmp_path)
    of_classes = [{f"classifier/{part}/{task}" for part in ("means", "factors")} for task in range(3)]
    files = [names_in(file) for file in files_of(tmp_path)]
    assert len(files) == 4 and all(names in files for names in of_classes)


def test_saving_again_replaces_the_state_and_leaves_no_other_file(results, tmp_path):
    for result in results:
        save_state(result.state, tmp_path)
        assert len(list(tmp_path.iterdir())) == 2 + result.state.tasks_done
    assert same_state(load_state(tmp_path), results[-1].state)
    save_state(results[0].state, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert same_state(load_state(tmp_path), results[0].state)


def test_what_a_killed_process_had_begun_to_write_is_removed_and_another_ones_is_not(results, tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    torn, under_way = (tmp_path / f".tensors-0123456789abcdef.safetensors.{pid}" for pid in (gone.pid, os.getppid()))
    for file in (torn, under_way):
        file.write_bytes(b"half of")
    save_state(results[0].state, tmp_path)
    assert not torn.exists() and under_way.exists()


def test_of_a_write_that_is_interrupted_nothing_is_left(tmp_path, monkeypatch):
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"content")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def written(monkeypatch) -> list[Path]:
    """The files that are written, in order."""
    paths, write = [], state_module.write_atomically
    monkeypatch.setattr(
        state_module, "write_atomically", lambda path, content: paths.append(path) or write(path, content)
    )
    return paths


def test_what_has_not_changed_is_written_once(results, written, tmp_path):
    for task, result in enumerate(results):
        written.clear()
        save_state(result.state, tmp_path)
        *tensors, manifest = written
        rest, of_the_task = sorted(map(names_in, tensors), key=len, reverse=True)
        assert manifest.name == "state.json"
        assert of_the_task == {f"classifier/{part}/{task}" for part in ("means", "factors")}
        assert not any(name.startswith(("classifier/means", "classifier/factors")) for name in rest)


def test_what_is_not_there_as_the_manifest_says_is_written_again(results, written, tmp_path):
    save_state(results[2].state, tmp_path)
    files_of(tmp_path)[0].unlink()
    save_state(results[2].state, tmp_path)
    assert same_state(load_state(tmp_path), results[2].state)
    for file in files_of(tmp_path):
        file.write_bytes(b"damaged")
    (tmp_path / "state.json").unlink()
    save_state(results[2].state, tmp_path)
    assert same_state(load_state(tmp_path), results[2].state)


def remembering(classes: int, width: int) -> RunState:
    """A state after two tasks of so many classes in all."""
    tensors: dict[str, Tensor] = {}
    for task in range(2):
        cov_DD = torch.cov(torch.randn(width, 40).double())
        gaussians = Gaussians.of(torch.ones(classes // 2, width).double(), cov_DD.expand(classes // 2, -1, -1))
        tensors |= {f"means/{task}": gaussians.mean_CD, f"factors/{task}": gaussians.factor_CP}
    return RunState("run", "backbone", "validation", 2, classifier=tensors)


@pytest.mark.parametrize(("classes", "width"), [(10, 64), (20, 192)])
def test_a_class_takes_half_a_square_of_half_precision_on_disk_and_its_mean(classes, width, tmp_path):
    save_state(remembering(classes, width), tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert 0 <= size - classes * (width * (width + 1) + 4 * width) < 1500


# Crashes.


def test_a_crash_between_tensors_and_manifest_leaves_the_old_state(results, tmp_path):
    save_state(results[0].state, tmp_path / "now")
    save_state(results[1].state, tmp_path / "next")
    for tensors in files_of(tmp_path / "next"):
        shutil.copy(tensors, tmp_path / "now")
    assert same_state(load_state(tmp_path / "now"), results[0].state)
    save_state(results[1].state, tmp_path / "now")
    assert same_state(load_state(tmp_path / "now"), results[1].state)


@pytest.mark.parametrize("after", range(4))
def test_a_crash_in_the_middle_of_writing_leaves_the_old_state(after, results, tmp_path, monkeypatch):
    """After any number of the files that the new state needs: three of tensors, and the manifest."""
    save_state(results[0].state, tmp_path)
    flushed, flush = [], state_module.os.fsync

    def full_disk(descriptor: int) -> None:
        if len(flushed) == after:
            raise OSError("No space left on device")
        flushed.append(flush(descriptor))

    with monkeypatch.context() as patch:
        patch.setattr("inflora.state.os.fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            save_state(results[2].state, tmp_path)
    assert same_state(load_state(tmp_path), results[0].state)
    save_state(results[2].state, tmp_path)
    assert same_state(load_state(tmp_path), results[2].state)
    assert len(files_of(tmp_path)) == 4


# Damage.


@pytest.mark.parametrize("where", [0, 0.5, 0.999])
@pytest.mark.parametrize("which", range(3))
def test_tampered_tensors_are_refused(which, where, results, tmp_path):
    save_state(results[1].state, tmp_path)
    file = files_of(tmp_path)[which]
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 1
    file.write_bytes(content)
    with pytest.raises(StateError, match=rf"{file.name} is damaged: its content does not match its hash"):
        load_state(tmp_path)


def test_truncated_swapped_or_missing_tensors_are_refused(results, tmp_path):
    save_state(results[1].state, tmp_path)
    first, second, third = files_of(tmp_path)
    whole = first.read_bytes()
    for content in (whole[:100], second.read_bytes()):
        first.write_bytes(content)
        with pytest.raises(StateError, match=f"{first.name} is damaged"):
            load_state(tmp_path)
    first.write_bytes(whole)
    third.unlink()
    with pytest.raises(StateError, match=f"cannot read .*{third.name}: No such file"):
        load_state(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\x80\x04N.", b"\xff\xfe"])
def test_a_damaged_manifest_is_refused(content, results, tmp_path):
    save_state(results[0].state, tmp_path)
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(StateError):
        load_state(tmp_path)


def test_a_manifest_with_a_byte_changed_is_refused_or_says_the_same(results, tmp_path):
    state = results[0].state._replace(data=None)
    save_state(state, tmp_path)
    manifest = tmp_path / "state.json"
    whole, refused = manifest.read_bytes(), 0
    places = range(0, len(whole), 7)
    for place in places:
        manifest.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert same_state(load_state(tmp_path), state)  # the last digits of a float may mean the same
        except StateError:
            refused += 1
    assert refused > 0.9 * len(places)


def test_the_folder_of_an_older_version_is_refused_in_a_line(results, tmp_path):
    save_state(results[0].state, tmp_path)
    manifest = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps(manifest | {"tensors": files_of(tmp_path)[0].name}))
    with pytest.raises(StateError, match=r"state\.json is damaged or of another version: .* valid array") as error:
        load_state(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_a_manifest_cannot_point_outside_its_folder(results, tmp_path):
    save_state(results[0].state, tmp_path / "state")
    file = files_of(tmp_path / "state")[0]
    file.rename(tmp_path / file.name)
    manifest = tmp_path / "state" / "state.json"
    for name in (f"../{file.name}", f"/../../{'0' * 57}", str(tmp_path / file.name)):
        facts = json.loads(manifest.read_text())
        facts["tensors"][0] = name
        manifest.write_text(json.dumps(facts))
        with pytest.raises(StateError, match="String should match pattern"):
            load_state(tmp_path / "state")


def test_nothing_in_a_saved_state_is_pickled(results, tmp_path):
    save_state(results[1].state, tmp_path)
    json.loads((tmp_path / "state.json").read_text())
    groups = {name.split("/")[0] for file in files_of(tmp_path) for name in names_in(file)}
    assert groups == {"model", "adapter", "classifier", "probes"}


def test_a_missing_state_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(StateError, match=f"no saved state in {tmp_path}"):
        load_state(tmp_path)
