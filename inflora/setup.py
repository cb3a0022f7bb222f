"""From a config to all that the loop needs: checks, device, stream, model, and what is recorded of them."""

import platform
from importlib.metadata import version
from typing import Any, NamedTuple

from inflora.adapters import Adapter
from inflora.backbone import BackboneShape, backbone_hash, build_backbone, meta_backbone, shape_of
from inflora.config import ConfigError, RunConfig, config_hash
from inflora.cuda import pick_device, require_device
from inflora.data import ensure_store
from inflora.data.loader import InputFormat
from inflora.data.store import read_manifest
from inflora.data.stream import EvaluateOn, Stream, make_stream
from inflora.data.tasks import check_tasks, in_numbers, name_of_stream
from inflora.draws import Draws
from inflora.integrity import check_state, facts_of
from inflora.learner import make_learner
from inflora.lora import adapted_layers
from inflora.model import ContinualModel
from inflora.precision import pick_precision
from inflora.replay import Replay
from inflora.state import RunState, StateError


class Setup(NamedTuple):
    """All that a run has from its first task to its last; the model and the adapter change as they learn."""

    model: ContinualModel
    adapter: Adapter[Any]
    stream: Stream
    input_format: InputFormat
    draws: Draws
    state: RunState


def set_up(config: RunConfig, state: RunState | None, evaluate_on: EvaluateOn) -> Setup:
    """Build what ``config`` describes, as it was when ``state`` was saved.

    Raises:
        ConfigError: Settings that do not fit each other, the data or the backbone.
        StateError: ``state`` belongs to another run, or does not hold what it must.
    """
    config = in_numbers(config)
    draws = check(config)
    device = pick_device(config.device)
    stream = make_stream(config.data, evaluate_on).resident_on(device)
    backbone = build_backbone(config.backbone)
    facts = facts_of(stream)
    fresh = RunState(config_hash(config), backbone_hash(backbone), evaluate_on, len(stream.tasks), data=facts)
    if state is not None:
        _check_goes_on(config, state, fresh)
    shape = shape_of(backbone)
    model, adapter = make_learner(config, backbone, pick_precision(config.precision, device, shape.width))
    draws.check(config, stream, adapter, model.classifier)
    if state is not None:
        restore(model, adapter, state)
    model.settle_on(device)
    if config.compile:
        backbone.compile()
    input_format = InputFormat(config.data, shape.image_size, shape.channels, device)
    return Setup(model, adapter, stream, input_format, draws, state or fresh)


def restore(model: ContinualModel, adapter: Adapter[Any], state: RunState) -> None:
    """Give a freshly prepared model and its adapter what they had learnt when ``state`` was saved."""
    model.load_learnt_state(state.model)
    adapter.load_state(state.adapter)
    model.classifier.load_state(state.classifier)


def _check_goes_on(config: RunConfig, state: RunState, fresh: RunState) -> None:
    """Raise StateError unless ``state`` is a whole one of the run that would begin with ``fresh``."""
    if state[:3] != fresh[:3]:
        raise StateError(
            f"the saved state belongs to run {state.config_hash} on {state.evaluate_on}, this is {fresh.config_hash} "
            f"on {fresh.evaluate_on} (backbones {state.backbone_hash} and {fresh.backbone_hash}); "
            "start in an empty folder"
        )
    check_state(config, state)
    names = ("classes", "channels", "raw", "content_hash", "split_hash")
    facts = [(getattr(state.data, name), getattr(fresh.data, name)) for name in names]
    if any(said != is_now for said, is_now in facts if said is not None):  # older states know no hashes
        raise StateError(f"the saved state is of another {config.data.dataset} than is here; start in an empty folder")


def check(config: RunConfig) -> Replay:
    """Require the settings to fit each other, the dataset and the backbone; nothing heavy is loaded.

    What a run replays is read by now, and comes back.

    Raises:
        ConfigError: They do not.
    """
    shape = check_learner(config)
    resize = config.data.eval_resize
    if resize is not None and resize < shape.image_size:
        raise ConfigError(f"data.eval_resize must be at least the input's side {shape.image_size}, got {resize}")
    manifest = read_manifest(ensure_store(config.data.dataset, config.data.root))
    check_tasks(config.data, manifest)
    if manifest.channels not in (1, shape.channels):
        raise ConfigError(
            f"{config.data.dataset} has {manifest.channels} channels, "
            f"backbone {config.backbone.name} reads {shape.channels}"
        )
    for name in ("mean", "std"):
        value = getattr(config.data, name)
        if isinstance(value, tuple) and len(value) != shape.channels:
            raise ConfigError(
                f"data.{name} must be one number with backbone {config.backbone.name}, which reads {shape.channels} "
                f"channel(s), got {len(value)}"
            )
    draws = Replay(config)
    require_device(config.device)
    return draws


def check_learner(config: RunConfig) -> BackboneShape:
    """Require the settings to fit each other and the backbone, whose shape comes back; no data is looked at.

    Raises:
        ConfigError: They do not.
    """
    backbone = meta_backbone(config.backbone)
    shape = shape_of(backbone)
    rank = getattr(config.adapter, "rank", 1)
    model, _ = make_learner(config, backbone)
    widths = [shape.width, *(layer.in_features for _, layer in adapted_layers(model))]
    if isinstance(rank, int) and rank > min(widths):
        raise ConfigError(f"adapter.rank must be at most the backbone's width {min(widths)}, got {rank}")
    if config.compile and model.prompts is not None:
        raise ConfigError(f"compile must be false with adapter {config.adapter.name}: prompts change the model's code")
    total_tasks = getattr(config.adapter, "total_tasks", None)
    tasks = config.data.task_count
    if total_tasks is not None and total_tasks < tasks:
        raise ConfigError(f"adapter.total_tasks must be at least the {tasks} tasks of data.tasks, got {total_tasks}")
    return shape


def search_stream(config: RunConfig) -> Stream:
    """The stream as trials see it, whatever the config trains on in the end: the test split is not opened."""
    return make_stream(config.data.model_copy(update={"train_on": "train"}), "validation")


def identity(config: RunConfig, stream: Stream | None = None) -> dict[str, str]:
    """All that a run's numbers depend on besides its settings: recorded with every result.

    ``stream`` is the config's ``search_stream``, where it has been made already.
    """
    config = in_numbers(config)
    stream = stream or search_stream(config)
    packages = ("torch", "timm", "inflora-sweeps")
    return {
        "config_hash": config_hash(config),
        "dataset": config.data.dataset,
        "dataset_hash": stream.manifest.content_hash,
        "stream": name_of_stream(config.data, len(stream.manifest.classes)),
        "class_order": ",".join(map(str, stream.class_order)),
        "split_hash": stream.split_hash,
        "backbone_hash": backbone_hash(build_backbone(config.backbone)),
        "seed": str(config.seed),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }
