"""Fixtures of the core's tests: a tiny run, and a folder for its data that is not the home folder."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import hypothesis
import pytest
import torch
from moto.server import ThreadedMotoServer
from torch import Tensor

from inflora.config import RunConfig, parse_config, settings_of_method
from inflora.data import ensure_store
from inflora.state import RunState

# No deadline, and none of hypothesis's own: a loaded machine is no failure.
hypothesis.settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Stores are prepared here, once for the session; subprocesses inherit the variable."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFLORA_DATA", str(tmp_path_factory.mktemp("data")))
        yield Path(os.environ["INFLORA_DATA"])


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Every test draws the same numbers in every run, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits(data_root: Path) -> Path:
    """The store of the digits; read it, do not write to it."""
    return ensure_store("digits", str(data_root))


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_state(a: RunState, b: RunState) -> bool:
    """Bit for bit."""
    rest = [state._replace(**dict.fromkeys(state.tensors)) for state in (a, b)]
    return rest[0] == rest[1] and all(same_tensors(a.tensors[group], b.tensors[group]) for group in a.tensors)


SMALL = {
    "l2p": {"pool": 4, "length": 2, "top": 2},
    "dualprompt": {"general_blocks": 1, "general_length": 2, "expert_blocks": 1, "expert_length": 3},
    "codaprompt": {"components": 3, "length": 4, "blocks": 2},
    "aligned": {"epochs": 2, "samples": 16, "temperature": 0.1},
}
"""Settings with which an adapter or a classifier fits the tiny run, where its own are too large for it."""


def pair_of(adapter: str, classifier: str = "linear") -> dict[str, Any]:
    """The settings of an adapter and a classifier in the tiny run, to be given to ``override``."""
    names = {"adapter": adapter, "classifier": classifier}
    return {group: {"name": name} | SMALL.get(name, {}) for group, name in names.items()}


def tiny_method(name: str) -> dict[str, Any]:
    """The settings of a published method in the tiny run, to be given to ``override``."""
    settings = settings_of_method(name)
    return settings | pair_of(settings["adapter"], settings["classifier"])


@pytest.fixture(scope="session")
def tiny() -> RunConfig:
    """A run of a second: random weights, two blocks of width 32, one epoch a task, five tasks of two digits."""
    backbone = {"name": "glyph_vit", "pretrained": False, "options": {"embed_dim": 32, "depth": 2, "num_heads": 2}}
    adapter = {"name": "inflora", "rank": 4}
    return parse_config({"backbone": backbone, "adapter": adapter, "optim": {"epochs": 1, "lr": 5e-3}, "device": "cpu"})


@pytest.fixture(scope="module")
def bucket():
    """A bucket that speaks S3's protocol, on this machine."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    names = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    names |= {"AWS_ACCESS_KEY_ID": "anyone", "AWS_SECRET_ACCESS_KEY": "anything"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket"
    server.stop()
