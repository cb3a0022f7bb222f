"""Fixtures of the core's tests: a tiny run, and a folder for its data that is not the home folder."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from inflora.config import RunConfig, parse_config
from inflora.data import ensure_store

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, max_examples=40)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Stores are prepared here, once for the session; subprocesses inherit the variable."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFLORA_DATA", str(tmp_path_factory.mktemp("data")))
        yield Path(os.environ["INFLORA_DATA"])


@pytest.fixture(scope="session")
def digits(data_root: Path) -> Path:
    """The store of the digits; read it, do not write to it."""
    return ensure_store("digits", str(data_root))


@pytest.fixture(scope="session")
def tiny() -> RunConfig:
    """A run of a second: random weights, two blocks of width 32, one epoch a task, five tasks of two digits."""
    backbone = {"name": "glyph_vit", "pretrained": False, "options": {"embed_dim": 32, "depth": 2, "num_heads": 2}}
    method = {"name": "inflora", "rank": 4}
    return parse_config({"backbone": backbone, "method": method, "optim": {"epochs": 1, "lr": 5e-3}, "device": "cpu"})
