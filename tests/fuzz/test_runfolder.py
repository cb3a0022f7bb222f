"""A run's folder with anything in it: the right answer, or one line; never a traceback, never another answer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from inflora.config import override
from inflora.runs import train_into
from inflora.serving import load, predict
from inflora.state import load_state
from tests.conftest import pair_of
from tests.fuzz.answers import OneLine, answered

pytestmark = pytest.mark.fuzz

Answer = tuple[tuple[str, float], ...]


def predict_one(folder: Path, image: Path) -> Answer:
    """Every class of an image with its probability, by the run in a folder."""
    ((_, classes, error, _),) = predict(load(folder), [image], top=10)
    assert not error
    return classes


class Run:
    """A finished run, whose files can be changed for a moment."""

    def __init__(self, folder: Path, image: Path) -> None:
        self.folder, self.image = folder, image
        self.files = sorted(path for path in folder.rglob("*") if path.is_file())
        self.right = self.answer()

    def answer(self) -> Answer:
        return predict_one(self.folder, self.image)

    def with_content(self, file: Path, content: bytes) -> str:
        """What using the folder comes to, with one file's content replaced: empty for the right answer."""
        whole = file.read_bytes()
        file.write_bytes(content)
        try:
            said = answered(self.answer)
        finally:
            file.write_bytes(whole)
        assert isinstance(said, OneLine) or said == self.right
        return said if isinstance(said, OneLine) else ""


@pytest.fixture(scope="module")
def finished(tiny, digits, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("fuzzed")
    changes = {"data.tasks": 2, "optim.batch_size": 256} | pair_of("inflora", "aligned")
    train_into(folder / "run", override(tiny, changes), "test")
    Image.effect_noise((8, 8), 40).save(folder / "image.png")
    return Run(folder / "run", folder / "image.png")


@settings(max_examples=80)
@given(data=st.data())
def test_a_byte_flipped_anywhere_gives_the_right_answer_or_one_line(data, finished):
    file = data.draw(st.sampled_from(finished.files))
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    said = finished.with_content(file, bytes(content))
    assert said or file.parent.name != "state" or file.name == "state.json"


@settings(max_examples=25)
@given(data=st.data())
def test_a_file_cut_short_or_of_other_bytes_gives_the_right_answer_or_one_line(data, finished):
    file = data.draw(st.sampled_from(finished.files))
    content = file.read_bytes()
    finished.with_content(file, content[: data.draw(st.integers(0, len(content)))])
    finished.with_content(file, data.draw(st.binary(max_size=64)))


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ANY = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner))


def places(node: object, path: tuple = ()) -> list[tuple]:
    """Where something else could be put in a JSON value."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, inner in pairs for place in places(inner, (*path, key)))]


def put(node: object, path: tuple, value: object) -> object:
    """The JSON value with another at a place."""
    if not path:
        return value
    copy = dict(node) if isinstance(node, dict) else list(node)
    copy[path[0]] = put(copy[path[0]], path[1:], value)
    return copy


@settings(max_examples=200)
@given(data=st.data())
def test_a_manifest_of_any_shape_is_the_state_or_refused_in_one_line(data, finished):
    file = finished.folder / "state" / "state.json"
    whole = file.read_bytes()
    manifest = json.loads(whole)
    edited = put(manifest, data.draw(st.sampled_from(places(manifest))), data.draw(ANY))
    file.write_text(json.dumps(edited))
    try:
        said = answered(lambda: load_state(file.parent))
    finally:
        file.write_bytes(whole)
    assert isinstance(said, OneLine) or edited == manifest


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe_instead(path: Path) -> None:
    import os

    path.unlink()
    os.mkfifo(path)


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize("make", [folder_instead, pipe_instead, link_to_itself, Path.unlink])
def test_what_is_no_file_is_said_in_one_line(make: Callable[[Path], None], finished, tmp_path):
    for number, file in enumerate(finished.files):
        copy = tmp_path / str(number)
        shutil.copytree(finished.folder, copy)
        make(copy / file.relative_to(finished.folder))
        said = answered(lambda copy=copy: predict_one(copy, finished.image))
        if not isinstance(said, OneLine):
            assert said == finished.right
            assert file.name in ("result.json", "adapter_config.json", "adapter_model.safetensors")
