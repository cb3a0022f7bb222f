"""What the core's tests share: a tiny run, tasks of noise, and a folder for data that is not the home folder."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import hypothesis
import pytest
import torch
from moto.server import ThreadedMotoServer
from torch import Tensor

from inflora.adapters import Adapter
from inflora.backbone import build_backbone
from inflora.config import DataSettings, OptimSettings, RunConfig, override, parse_config, settings_of_method
from inflora.data import ensure_store
from inflora.data.loader import InputFormat
from inflora.data.pixels import RawPixels
from inflora.data.store import Images
from inflora.data.stream import Task
from inflora.draws import Draws
from inflora.features import features_of
from inflora.learner import make_learner
from inflora.model import ContinualModel
from inflora.state import RunState
from inflora.task_data import TaskData
from inflora.training import train_task

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # begun in a script's background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the commands under test are begun by hand

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: begun last, it would keep one core waiting for the other."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


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
    "ranpac": {"features": 48},
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


def task_of_noise(index: int = 0, seed: int = 0, **optim: Any) -> TaskData:
    """Task ``index`` of three: two classes of twelve images of noise each, not augmented, in batches of eight."""
    task = Task(index, 2 * index, ("a", "b"), torch.arange(24), torch.arange(0))
    pixels = torch.randint(256, (24, 32, 32, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
    images = Images(RawPixels(pixels), task.first_label + torch.arange(24) % 2, torch.zeros(24, dtype=torch.int64))
    input_format = InputFormat(DataSettings(augment="none"), 32, 1, torch.device("cpu"))
    return TaskData(task, 3, images, input_format, OptimSettings(batch_size=8, **optim), Draws(seed))


def begun(
    tiny: RunConfig, pair: dict[str, Any], tasks: int = 1, **optim: Any
) -> tuple[ContinualModel, Adapter[Any], TaskData]:
    """A model of the tiny run's kind that has learnt all of so many tasks of noise but the last, which has begun."""
    config = override(tiny, pair)
    model, adapter = make_learner(config, build_backbone(config.backbone))
    for index in range(tasks):
        data = task_of_noise(index, **{"lr": 0.01, "epochs": 2} | optim)
        model.classifier.begin_task(data)
        adapter.begin_task(model, data)
        if index + 1 < tasks:
            train_task(model, adapter, data, lambda _: None)
            adapter.end_task(model, data)
            model.classifier.fit(features_of(model, data), None, data)
    return model, adapter, data


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
