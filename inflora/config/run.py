"""Every setting of a run, as frozen models that check themselves: data, backbone, adapter, classifier, optimiser."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from inflora.config.adapters import ADAPTERS, InfLoRASettings
from inflora.config.alternatives import Alternative, one_of
from inflora.config.base import (
    ConfigError,
    Count,
    Epochs,
    File,
    Flag,
    Images,
    Name,
    Number,
    Rate,
    Scale,
    Seed,
    Settings,
    Share,
    Text,
    Weight,
    Width,
)
from inflora.config.classifiers import CLASSIFIERS, LinearSettings
from inflora.config.streams import is_stream_name

Level = Annotated[Number, Field(ge=-1e6, le=1e6)]


class AugmentSettings(Settings):
    """Per-sample training augmentation (torchvision's RandomResizedCrop and RandomHorizontalFlip)."""

    scale: tuple[Scale, Scale] = Field(default=(0.08, 1.0), description="shares of the image that a crop may have")
    ratio: tuple[Scale, Scale] = Field(default=(3 / 4, 4 / 3), description="widths / heights that a crop may have")
    flip: Flag = Field(default=True, description="mirror half of the images")

    @field_validator("scale", "ratio")
    @classmethod
    def _ordered(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        low, high = bounds
        if not low <= high:
            raise ValueError("must be two numbers with low <= high")
        return bounds

    @field_validator("scale")
    @classmethod
    def _inside_the_image(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if scale[1] > 1:
            raise ValueError("must not exceed 1, the whole image")
        return scale


def pycil_seed(order: str) -> int:
    """The seed in the name of an order, ``pycil-<seed>``."""
    return int(order.removeprefix("pycil-"))


class DataSettings(Settings):
    """Which images, cut into which tasks, seen through which augmentation."""

    dataset: Name = Field(default="digits", description="inflora data info NAME tells of it")
    root: Text | None = Field(
        default=None, description="folder or URI (s3://...) of the stores; default: $INFLORA_DATA or ~/.cache"
    )
    scenario: Literal["class", "domain"] = Field(
        default="class", description="what arrives: new classes, or new domains"
    )
    tasks: Count | Annotated[tuple[Count, ...], Field(max_length=100_000)] | Name = Field(
        default=5, description="how many tasks of equal size, the number of classes of each, or B50-Inc10: 50, then 10s"
    )
    joint: Flag = Field(default=False, description="learn all tasks as one: the upper bound of every continual learner")
    order_seed: Seed | None = Field(default=None, description="None keeps the natural order of classes or domains")
    order: Name | None = Field(default=None, description="pycil-1993: shuffled as PyCIL and PILOT do with that seed")
    validation: Annotated[Share, Field(lt=1)] = Field(
        default=0.1, description="share of the training images held out, per class"
    )
    split_seed: Seed = Field(default=0, description="draws the validation images")
    train_on: Literal["train", "train+validation"] = Field(
        default="train", description="train+validation is for final training, judged on test images"
    )
    augment: AugmentSettings | Literal["none"] = Field(
        default=AugmentSettings(), description="crops and flips, or none"
    )
    eval_resize: Width | None = Field(
        default=None, description="shorter side before the central crop of evaluation; None: the input's side"
    )
    mean: Level | tuple[Level, Level, Level] = Field(default=0.0, description="subtracted, of pixels in [0, 1]")
    std: Scale | tuple[Scale, Scale, Scale] = Field(default=1.0, description="then divided by")

    @field_validator("root", mode="before")
    @classmethod
    def _plain_text(cls, root: Any) -> Any:
        if not str(root).startswith("~"):
            return str(root) if isinstance(root, Path) else root
        try:
            return str(Path(root).expanduser())
        except RuntimeError:
            raise ValueError("names nobody's home folder") from None

    @field_validator("tasks")
    @classmethod
    def _some_tasks(cls, tasks: int | tuple[int, ...] | str) -> int | tuple[int, ...] | str:
        if isinstance(tasks, str) and not is_stream_name(tasks):
            raise ValueError("must be numbers, or the name of a stream as B0-Inc10 and B50-Inc10")
        if not tasks:
            raise ValueError("must list at least one task")
        return tasks

    @field_validator("order")
    @classmethod
    def _known_shuffle(cls, order: str | None) -> str | None:
        if order is not None and (not re.fullmatch(r"pycil-\d{1,10}", order, re.ASCII) or pycil_seed(order) >= 2**32):
            raise ValueError("must be pycil-<seed> with a seed from 0 to 4294967295, as pycil-1993")
        return order

    @model_validator(mode="after")
    def _one_order(self) -> Self:
        if self.order is not None and self.order_seed is not None:
            raise ValueError(f"order and order_seed are two orders, got {self.order} and {self.order_seed}; set one")
        return self

    @property
    def task_count(self) -> int:
        """The number of tasks that are learnt one after another.

        Raises:
            ConfigError: A name is in the place of numbers (``inflora.data.tasks.in_numbers``).
        """
        if self.joint:
            return 1
        if isinstance(self.tasks, str):
            raise ConfigError(
                f"data.tasks={self.tasks} has a number of tasks where a dataset is read (inflora train, a recipe); "
                "here give the number, or the list of their classes"
            )
        return len(self.tasks) if isinstance(self.tasks, tuple) else self.tasks


class BackboneSettings(Settings):
    """The frozen model: ``glyph_vit`` (shipped), or any of timm by its name that has attention (docs/backbones.md)."""

    name: Name = Field(default="glyph_vit", description="or one of timm, e.g. vit_base_patch16_224.augreg_in21k")
    weights: File | None = Field(
        default=None, description="a local file (.safetensors, .npz, .pth) instead of the named weights"
    )
    pretrained: Flag = Field(default=True, description="False: seeded random weights, for tests and timings")
    options: dict[str, JsonValue] = Field(default={}, description="keyword arguments of timm's class, e.g. img_size")


Precision = Literal["fp32", "tf32", "bf16"]
"""Of matrix products: float32; float32 with 10 bits of each factor, on GPUs; bfloat16."""


class FirstTaskSettings(Settings):
    """The first task's own settings; None keeps the value of the other tasks."""

    lr: Rate | None = Field(default=None, description="of the first task only")
    epochs: Epochs | None = Field(default=None, description="of the first task only")
    weight_decay: Weight | None = Field(default=None, description="of the first task only")


class OptimSettings(Settings):
    """The optimiser of every task; each task starts with a fresh one."""

    name: Literal["adam", "sgd"] = Field(default="adam", description="sgd has momentum 0.9")
    lr: Rate = Field(default=5e-4, description="of the adapters, and of the classifier unless head_lr is set")
    head_lr: Rate | None = Field(default=None, description="of the classifier; None: as lr")
    head_init: Literal["uniform", "zero"] = Field(
        default="uniform", description="how a task's classifier begins: as nn.Linear does, or at zero"
    )
    epochs: Epochs = Field(default=20, description="passes over a task's training images")
    schedule: Literal["cosine", "step", "constant"] = Field(
        default="cosine", description="of the learning rate over a task's epochs"
    )
    milestones: Annotated[tuple[Epochs, ...], Field(max_length=1_000)] = Field(
        default=(), description="step: the epochs (from 0) that lower the rate"
    )
    decay: Share = Field(default=0.1, description="step: by this factor")
    batch_size: Images = Field(default=128, description="images per update, over all workers together")
    weight_decay: Weight = Field(default=0.0, description="of all that is trained")
    first_task: FirstTaskSettings = FirstTaskSettings()

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


class ReplaySettings(Settings):
    """Recorded choices in the place of drawn ones: .safetensors files (docs/fidelity.md)."""

    orders: File | None = Field(default=None, description="every pass's images, in place of shuffling")
    heads: File | None = Field(default=None, description="beginnings of the tasks' linear classifiers")
    draws: File | None = Field(default=None, description="features that classifiers are aligned on")


if TYPE_CHECKING:  # which ones there are is known when the program runs
    AdapterSettings = Alternative
    ClassifierSettings = Alternative
else:
    AdapterSettings, ClassifierSettings = one_of(ADAPTERS), one_of(CLASSIFIERS)


class RunConfig(Settings):
    """One run: a stream of tasks, a backbone, what adapts it, what tells classes apart, and an optimiser."""

    data: DataSettings = DataSettings()
    backbone: BackboneSettings = BackboneSettings()
    adapter: AdapterSettings = Field(default=InfLoRASettings(), description="what adapts the backbone")
    classifier: ClassifierSettings = Field(default=LinearSettings(), description="what tells features apart")
    optim: OptimSettings = OptimSettings()
    replay: ReplaySettings = ReplaySettings()
    seed: Seed = Field(default=0, description="draws beginnings, orders of images and augmentation")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: CUDA where there is one")
    precision: Literal["auto", Precision] = Field(
        default="auto",
        description="of the backbone's products; auto: bf16 where the device is faster in it; tf32: on GPUs",
    )
    compile: Flag = Field(default=False, description="compile the backbone: a minute or more before the first step")
    provenance: dict[str, JsonValue] = Field(
        default={}, description="where an exported config comes from; not a setting"
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        named = isinstance(self.data.tasks, str) and not self.data.joint  # checked again as numbers
        if not named and self.data.task_count == 1 and self.classifier.name == "aligned":
            raise ValueError("classifier aligned needs several tasks: with one there is nothing to align")
        views = getattr(self.classifier, "views", None)
        if views and self.data.augment == "none":
            raise ValueError(f"classifier.views are augmented, got {views} with data.augment none")
        if self.replay.draws is not None and self.classifier.name != "aligned":
            raise ValueError(f"replay.draws are for classifier aligned, got classifier {self.classifier.name}")
        return self

    @field_validator("provenance")
    @classmethod
    def _names_what_was_changed(cls, provenance: dict[str, JsonValue]) -> dict[str, JsonValue]:
        changed = provenance.get("changed", [])
        if not isinstance(changed, list) or not all(isinstance(name, str) for name in changed):
            raise ValueError("must have a list of names of settings as changed")
        return provenance
