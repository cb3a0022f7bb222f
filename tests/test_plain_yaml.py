"""The YAML that settings are read from: plain values, and one line for everything else, at once."""

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inflora.config import YamlError, dump_yaml, read_yaml, read_yaml_file

scalars = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    scalars
    | st.text(max_size=12)
    | st.sampled_from(["5e-4", "1_0", "010", "2024-01-01", "1:30", "no", "<<", "=", "~"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


@given(values)
def test_what_is_written_is_read_back_to_the_same_value_of_the_same_type(value):
    read = read_yaml(dump_yaml(value))
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("# nothing", None),
        ("2024-13-45", "2024-13-45"),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("010", "010"),
        ("0x10", "0x10"),
        ("5e-4", 5e-4),
        ("1_000", 1000),
        ("yes", True),
        ("'yes'", "yes"),
        ("[1, [2.5, a]]", [1, [2.5, "a"]]),
        ("<<: a", {"<<": "a"}),
        ("\ufeffa: 1", {"a": 1}),
        ("a: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
    ],
)
def test_plain_values_are_read_as_what_they_look_like(text, value):
    assert read_yaml(text) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("!!int abc", "tags"),
        ("!!python/object/apply:os.system [ls]", "tags"),
        ("! a", "tags"),
        ("&a [*a]", "anchors"),
        ("a: &x [1]\nb: *x", "anchors"),
        ("9" * 5000, "at most 40 digits, got 5000"),
        ("1e999", "finite"),
        (".nan", "finite"),
        ("[" * 10_000, "nested more than 20"),
        ("{a: " * 10_000, "nested more than 20"),
        ("- " * 10_000, "nested more than 20"),
        ("{a: 1, a: 2}", "twice"),
        ("{1: 2}", "keys must be text"),
        ("? [a]\n: b", "keys must be text"),
        ("a\n---\nb", "more than one document"),
        ("a:\n\tb: 1", "line 2"),
        ("a\0b", r"U\+0000"),
        ("%YAML 1." + "9" * 5000 + "\n--- a", "limit"),
        ('"\\UFFFFFFFF"', "too large"),
        ("[a", "line 1"),
    ],
    ids=lambda text: text[:12],
)
def test_everything_else_is_refused_at_once_in_one_short_line(text, reason):
    start = time.monotonic()
    with pytest.raises(YamlError, match=reason) as error:
        read_yaml(text)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 300
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "missing"])
def test_only_regular_files_are_opened(kind, tmp_path):
    path = tmp_path / "x.yaml"
    if kind == "folder":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(OSError, match=r"folder|no regular file|No such file"):
        read_yaml_file(Path("/dev/zero") if kind == "device" else path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"a: " + b"x" * 2**20, "larger than"), ("a: 1".encode("utf-16"), "UTF-8"), (b"\xe9", "UTF-8")],
)
def test_files_are_of_bounded_size_and_utf_8(content, reason, tmp_path):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(YamlError, match=reason):
        read_yaml_file(tmp_path / "x.yaml")
