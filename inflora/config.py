"""Every setting of a run, as frozen models that check themselves.

The dotted path of a setting (``method.rank``, ``method.energy``, ``optim.lr``) is its name everywhere: in YAML, on
the command line, in a search space, in Optuna, as an MLflow parameter and in the exported file.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)


class ConfigError(ValueError):
    """A setting that a user can mend: the message is one line with the rule, the value and what is allowed."""


class Settings(BaseModel):
    """Base of every group of settings: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AugmentSettings(Settings):
    """Per-sample training augmentation (torchvision's RandomResizedCrop and RandomHorizontalFlip)."""

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    @field_validator("scale", "ratio")
    @classmethod
    def _ordered(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        low, high = bounds
        if not 0 < low <= high:
            raise ValueError("must be two numbers with 0 < low <= high")
        return bounds

    @field_validator("scale")
    @classmethod
    def _inside_the_image(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if scale[1] > 1:
            raise ValueError("must not exceed 1, the whole image")
        return scale


class DataSettings(Settings):
    """Which images, cut into which tasks, seen through which augmentation."""

    dataset: str = "digits"
    root: str | None = Field(
        default=None, description="folder or URI (s3://...) of the stores; default: $INFLORA_DATA or ~/.cache"
    )
    scenario: Literal["class", "domain"] = Field(
        default="class", description="what arrives: new classes, or new domains"
    )
    tasks: PositiveInt | tuple[PositiveInt, ...] = Field(
        default=5, description="how many tasks of equal size, or the number of classes of each"
    )
    order_seed: int | None = Field(default=None, ge=0, description="None keeps the natural order of classes or domains")
    validation: float = Field(default=0.1, gt=0, lt=1, description="share of the training images held out, per class")
    split_seed: int = Field(default=0, ge=0)
    train_on: Literal["train", "train+validation"] = "train"
    augment: AugmentSettings | Literal["none"] = AugmentSettings()
    eval_resize: int | None = Field(
        default=None, ge=1, description="shorter side before the central crop of evaluation; None: the input's side"
    )
    mean: float | tuple[float, float, float] = Field(default=0.0, description="subtracted, of pixels in [0, 1]")
    std: PositiveFloat | tuple[PositiveFloat, PositiveFloat, PositiveFloat] = 1.0

    @field_validator("root", mode="before")
    @classmethod
    def _plain_text(cls, root: Any) -> Any:
        return str(root) if isinstance(root, Path) else root

    @field_validator("tasks")
    @classmethod
    def _some_tasks(cls, tasks: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if not tasks:
            raise ValueError("must list at least one task")
        return tasks

    @property
    def task_count(self) -> int:
        """How many tasks the stream has."""
        return len(self.tasks) if isinstance(self.tasks, tuple) else self.tasks


class BackboneSettings(Settings):
    """The frozen vision transformer: ``glyph_vit`` (shipped), or any timm ``VisionTransformer`` by its name."""

    name: str = "glyph_vit"
    weights: Path | None = Field(
        default=None, description="a local file (.safetensors, .npz, .pth) instead of the named weights"
    )
    pretrained: bool = Field(default=True, description="False: seeded random weights, for tests and timings")
    options: dict[str, JsonValue] = Field(default={}, description="keyword arguments of timm's VisionTransformer")


class InfLoRASettings(Settings):
    """InfLoRA: adapters designed not to disturb the old tasks."""

    name: Literal["inflora"] = "inflora"
    rank: int = Field(default=10, ge=1)
    energy: float = Field(default=0.95, gt=0, le=1, description="share of input energy the memory keeps, first task")
    energy_end: float = Field(default=1.0, gt=0, le=1, description="where the threshold would arrive after the last")
    total_tasks: int | None = Field(default=None, ge=1, description="T of the schedule; None: the stream's length")
    memory: Literal["dualgpm", "gpm"] = "dualgpm"
    energy_of: Literal["covariance", "inputs"] = "covariance"
    blocks: int | None = Field(default=None, ge=1, description="adapt the first n blocks only; None: all")

    @model_validator(mode="after")
    def _threshold_rises(self) -> Self:
        if self.energy_end < self.energy:
            raise ValueError(f"energy_end must be at least energy ({self.energy}), got {self.energy_end}")
        return self


AFTER_FIRST_TASK = frozenset({"energy", "energy_end", "total_tasks", "memory", "energy_of"})
"""Settings of methods that are felt from the second task on: what is remembered, not how the first task is learnt."""


class SequentialSettings(Settings):
    """Plain LoRA trained task after task with nothing protected: the lower bound."""

    name: Literal["sequential"] = "sequential"
    rank: int = Field(default=10, ge=1)
    blocks: int | None = Field(default=None, ge=1)


class FrozenSettings(Settings):
    """Only the classifiers are trained, on the features of the pre-trained backbone."""

    name: Literal["frozen"] = "frozen"


class JointSettings(Settings):
    """Plain LoRA on all tasks at once: the upper bound."""

    name: Literal["joint"] = "joint"
    rank: int = Field(default=10, ge=1)
    blocks: int | None = Field(default=None, ge=1)


MethodSettings = Annotated[
    InfLoRASettings | SequentialSettings | FrozenSettings | JointSettings, Field(discriminator="name")
]


class FirstTaskSettings(Settings):
    """What the first task does differently; None keeps the value of the other tasks."""

    lr: float | None = Field(default=None, gt=0)
    epochs: int | None = Field(default=None, ge=1)
    weight_decay: float | None = Field(default=None, ge=0)


class OptimSettings(Settings):
    """The optimiser of every task; each task starts with a fresh one."""

    name: Literal["adam", "sgd"] = "adam"
    lr: float = Field(default=5e-4, gt=0, description="of the adapters, and of the classifier unless head_lr is set")
    head_lr: float | None = Field(default=None, gt=0)
    head_init: Literal["uniform", "zero"] = "uniform"
    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=128, ge=1, description="images per update, over all workers together")
    weight_decay: float = Field(default=0.0, ge=0)
    first_task: FirstTaskSettings = FirstTaskSettings()

    def of_task(self, index: int) -> "OptimSettings":
        """The settings that task ``index`` (from 0) trains with."""
        return self.model_copy(update=self.first_task.model_dump(exclude_none=True)) if index == 0 else self


class RunConfig(Settings):
    """One run: a stream of tasks, a backbone, a method and an optimiser."""

    data: DataSettings = DataSettings()
    backbone: BackboneSettings = BackboneSettings()
    method: MethodSettings = InfLoRASettings()
    optim: OptimSettings = OptimSettings()
    seed: int = Field(default=0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    provenance: dict[str, JsonValue] = Field(
        default={}, description="where an exported config comes from; not a setting"
    )


# What may differ between two machines that do the same run.
_NOT_IDENTITY = {"data": {"root"}, "device": True, "provenance": True, "backbone": {"weights"}}


def config_hash(config: RunConfig) -> str:
    """Identity of a run's settings; paths, device and provenance do not count (weights count by their own hash)."""
    settings = config.model_dump(mode="json", exclude=_NOT_IDENTITY)  # type: ignore[arg-type]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def parse_config(settings: Mapping[str, Any]) -> RunConfig:
    """A checked config from plain values.

    Raises:
        ConfigError: One line that names every setting that breaks a rule.
    """
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def explain(error: ValidationError) -> str:
    """A pydantic error as one line: which setting, which rule, what was given; unknown names list the known ones."""
    root = RunConfig if error.title == "RunConfig" else None
    return " ".join("; ".join(_explain_one(root, e) for e in error.errors()).split())


def _explain_one(root: type[BaseModel] | None, error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    known = _known_names(root, path[:-1]) if root else []
    shown = ".".join(part for part in path if part not in _TAGS) or "config"
    if error["type"] == "extra_forbidden":
        return f"unknown setting {shown}; known here: {', '.join(known)}" if known else f"unknown setting {shown}"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    given = "" if isinstance(error["input"], dict) else f", got {error['input']!r}"
    return f"{shown}: {message}{given}"


_METHODS: dict[str, type[Settings]] = {
    cls.model_fields["name"].default: cls
    for cls in (InfLoRASettings, SequentialSettings, FrozenSettings, JointSettings)
}
# Parts of pydantic's error locations that are not names of settings: the branch of a union.
_TAGS = {*_METHODS, "AugmentSettings", "literal['none']"}


def _known_names(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        if part in _METHODS:
            model = _METHODS[part]
        elif part == "AugmentSettings":
            model = AugmentSettings
        elif part in model.model_fields:
            annotation = model.model_fields[part].annotation
            model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else model
    return list(model.model_fields)


def override(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """``config`` with dotted settings replaced, e.g. ``{"method.rank": 8}``; everything is checked again.

    A path may name a whole group: ``{"method": {"name": "frozen"}}``. Another ``method.name`` starts from that method's
    own defaults. A config that came from elsewhere remembers what was changed in it.

    Raises:
        ConfigError: An unknown path or a value that breaks a rule.
    """
    settings = config.model_dump()
    changed = set(settings["provenance"].get("changed", []))
    for path, value in changes.items():
        *groups, name = path.split(".")
        node = settings
        for group in groups:
            if not isinstance(node.get(group), dict):
                raise ConfigError(f"unknown setting {path}; known here: {', '.join(node)}")
            node = node[group]
        if path == "method.name" and value != node.get("name"):
            node.clear()
        changed |= {path} if node.get(name) != value else set()
        node[name] = value
    if changed and settings["provenance"]:
        settings["provenance"]["changed"] = sorted(changed)
    return parse_config(settings)


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """``["method.rank=8"]`` as ``{"method.rank": 8}``; values are read as YAML."""
    changes = {}
    for assignment in assignments:
        path, separator, value = assignment.partition("=")
        if not separator or not path:
            raise ConfigError(f"a setting is given as key=value, got {assignment!r}")
        changes[path] = _scalar(value)
    return changes


def _scalar(text: str) -> Any:
    """A YAML value, reading 5e-4 as the number that everyone but YAML 1.1 takes it for."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"not a YAML value: {text!r}") from None
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def load_config(path: Path) -> RunConfig:
    """The config in a YAML file.

    Raises:
        ConfigError: The file is missing, is not YAML, or breaks a rule.
    """
    try:
        settings = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, got {type(settings).__name__}")
    return parse_config(settings)


def dump_config(config: RunConfig) -> str:
    """The config as YAML that ``load_config`` reads back to an equal value."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=False), sort_keys=False)
