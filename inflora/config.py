"""Every setting of a run, as frozen models that check themselves.

The dotted path of a setting (``method.rank``, ``method.energy``, ``optim.lr``) is its name everywhere: in YAML, on
the command line, in a search space, in Optuna, as an MLflow parameter and in the exported file.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

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

from inflora.errors import UserError


class ConfigError(UserError):
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
    order: Path | None = Field(
        default=None, description="a .safetensors file with every pass's images, in place of shuffling"
    )
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


Precision = Literal["fp32", "tf32", "bf16"]
"""How matrix products are taken: in float32; of float32 with 10 bits of each factor, on GPUs; in bfloat16."""

Target = Literal["q", "k", "v", "attn.proj", "mlp.fc1", "mlp.fc2"]


class LoRASettings(Settings):
    """What every method with low-rank adapters has."""

    name: str
    rank: int = Field(default=10, ge=1)
    blocks: int | None = Field(default=None, ge=1, description="adapt the first n blocks only; None: all")
    targets: tuple[Target, ...] = Field(default=("k", "v"), min_length=1, description="what is adapted in a block")

    @field_validator("targets")
    @classmethod
    def _each_once(cls, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        if len(set(targets)) < len(targets):
            raise ValueError("must name each target once")
        return targets


class AlignmentSettings(Settings):
    """Classifier alignment: after each task but the first, all classifiers learn on features drawn from Gaussians."""

    epochs: int = Field(default=0, ge=0, description="0: no alignment; the published runs have 5")
    lr: float = Field(default=0.01, gt=0)
    weight_decay: float = Field(default=5e-4, ge=0)
    samples: int = Field(default=256, ge=1, description="features drawn per class seen and epoch; also the batch size")
    temperature: float | None = Field(default=None, gt=0, description="of the normalised logits; None: not normalised")
    draws: Path | None = Field(
        default=None, description="a .safetensors file with every epoch's features, in place of drawing"
    )


class InfLoRASettings(LoRASettings):
    """InfLoRA: adapters designed not to disturb the old tasks."""

    name: Literal["inflora"] = "inflora"
    energy: float = Field(default=0.95, gt=0, le=1, description="share of input energy the memory keeps, first task")
    energy_end: float = Field(default=1.0, gt=0, le=1, description="where the threshold would arrive after the last")
    total_tasks: int | None = Field(default=None, ge=1, description="T of the schedule; None: the stream's length")
    memory: Literal["dualgpm", "gpm"] = "dualgpm"
    energy_of: Literal["covariance", "inputs"] = "covariance"
    classifier_alignment: AlignmentSettings = AlignmentSettings()

    @model_validator(mode="after")
    def _threshold_rises(self) -> Self:
        if self.energy_end < self.energy:
            raise ValueError(f"energy_end must be at least energy ({self.energy}), got {self.energy_end}")
        return self


AFTER_FIRST_TASK = frozenset(
    {"energy", "energy_end", "total_tasks", "memory", "energy_of"}
    | {f"classifier_alignment.{name}" for name in AlignmentSettings.model_fields}
)
"""Settings of methods that are felt from the second task on: what is remembered, not how the first task is learnt."""


class SequentialSettings(LoRASettings):
    """Plain LoRA trained task after task with nothing protected: the lower bound."""

    name: Literal["sequential"] = "sequential"


class JointSettings(LoRASettings):
    """Plain LoRA on all tasks at once: the upper bound."""

    name: Literal["joint"] = "joint"


class OLoRASettings(LoRASettings):
    """O-LoRA: plain LoRA whose new A is pulled towards being orthogonal to the old ones."""

    name: Literal["olora"] = "olora"
    penalty: float = Field(default=0.5, ge=0, description="weight of the squared products of new and old rows of A")


class SDLoRASettings(LoRASettings):
    """SD-LoRA: old directions are kept, their magnitudes go on learning."""

    name: Literal["sdlora"] = "sdlora"


class FrozenSettings(Settings):
    """Only the classifiers are trained, on the features of the pre-trained backbone."""

    name: Literal["frozen"] = "frozen"


class NCMSettings(Settings):
    """Nearest class mean on the features of the pre-trained backbone: nothing is trained."""

    name: Literal["ncm"] = "ncm"


class L2PSettings(Settings):
    """L2P: a pool of prompts, of which each image picks those with the nearest keys."""

    name: Literal["l2p"] = "l2p"
    pool: int = Field(default=10, ge=1, description="prompts in the pool")
    length: int = Field(default=5, ge=1, description="tokens per prompt")
    top: int = Field(default=5, ge=1, description="prompts that an image picks")
    pull: float = Field(default=0.5, ge=0, description="weight of the distance between an image and the keys it picks")

    @model_validator(mode="after")
    def _enough_prompts(self) -> Self:
        if self.top > self.pool:
            raise ValueError(f"top must be at most pool ({self.pool}), got {self.top}")
        return self


class DualPromptSettings(Settings):
    """DualPrompt: prompts common to all tasks in the first blocks, a task's own in the blocks that follow."""

    name: Literal["dualprompt"] = "dualprompt"
    general_blocks: int = Field(default=2, ge=0)
    general_length: int = Field(default=5, ge=1)
    expert_blocks: int = Field(default=3, ge=1)
    expert_length: int = Field(default=20, ge=1)
    pull: float = Field(default=1.0, ge=0, description="weight of the distance between an image and its task's key")


class CODAPromptSettings(Settings):
    """CODA-Prompt: each image's prompt is a weighted sum of components; every task adds some."""

    name: Literal["codaprompt"] = "codaprompt"
    components: int = Field(default=10, ge=1, description="components that each task adds")
    length: int = Field(default=8, ge=2, multiple_of=2, description="tokens: half for the keys, half for the values")
    blocks: int = Field(default=5, ge=1, description="prompt the first n blocks")
    orthogonality: float = Field(default=0.1, ge=0, description="weight of the components' squared overlaps")


MethodSettings = Annotated[
    InfLoRASettings
    | SequentialSettings
    | FrozenSettings
    | JointSettings
    | NCMSettings
    | OLoRASettings
    | SDLoRASettings
    | L2PSettings
    | DualPromptSettings
    | CODAPromptSettings,
    Field(discriminator="name"),
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
    head_init: Literal["uniform", "zero"] | Path = Field(
        default="uniform", description="nn.Linear's own, zeros, or a .safetensors file (docs/fidelity.md)"
    )
    epochs: int = Field(default=20, ge=1)
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="step: the epochs (from 0) that lower the rate"
    )
    decay: float = Field(default=0.1, gt=0, le=1, description="step: by this factor")
    batch_size: int = Field(default=128, ge=1, description="images per update, over all workers together")
    weight_decay: float = Field(default=0.0, ge=0)
    first_task: FirstTaskSettings = FirstTaskSettings()

    @field_validator("head_init")
    @classmethod
    def _known_start(cls, start: str | Path) -> str | Path:
        if isinstance(start, Path) and start.suffix != ".safetensors":
            raise ValueError("must be 'uniform', 'zero' or a .safetensors file")
        return start

    @model_validator(mode="after")
    def _milestones_for_steps(self) -> Self:
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError(
                f"milestones belong to schedule step, and it needs some; got schedule {self.schedule}, "
                f"milestones {list(self.milestones)}"
            )
        return self

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
    precision: Literal["auto", Precision] = Field(
        default="auto",
        description="of the backbone's products; auto: bf16 where the device is faster in it; tf32: on GPUs",
    )
    compile: bool = Field(default=False, description="compile the backbone: a minute or more before the first step")
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
    cls.model_fields["name"].default: cls for cls in get_args(get_args(MethodSettings)[0])
}
# Parts of pydantic's error locations that are not names of settings: the branch of a union.
_TAGS = {*_METHODS, "AugmentSettings", "literal['none']", "literal['uniform','zero']", "path"}


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
