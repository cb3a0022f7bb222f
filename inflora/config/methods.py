"""The settings of every method, one class each."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from inflora.config.base import Count, Depth, File, Rate, Scale, Settings, Share, Weight, Whole, Width

Target = Literal["q", "k", "v", "attn.proj", "mlp.fc1", "mlp.fc2"]


Prompted = Annotated[Whole, Field(ge=1, le=1_024)]
"""Prompts, or tokens of one: an image has some hundred tokens of its own, and attention pays for all with all."""


class LoRASettings(Settings):
    """What every method with low-rank adapters has."""

    name: str
    rank: Width = Field(default=10, description="of the adapters: directions that a task may learn in")
    blocks: Depth | None = Field(default=None, description="adapt the first n blocks only; None: all")
    targets: tuple[Target, ...] = Field(default=("k", "v"), min_length=1, description="what is adapted in a block")

    @field_validator("targets")
    @classmethod
    def _each_once(cls, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        if len(set(targets)) < len(targets):
            raise ValueError("must name each target once")
        return targets


class AlignmentSettings(Settings):
    """Classifier alignment: after each task but the first, all classifiers learn on features drawn from Gaussians."""

    epochs: Annotated[Whole, Field(ge=0, le=100_000)] = Field(
        default=0, description="0: no alignment; the published runs have 5"
    )
    lr: Rate = Field(default=0.01, description="of the aligned classifiers")
    weight_decay: Weight = Field(default=5e-4, description="of the aligned classifiers")
    samples: Width = Field(default=256, description="features drawn per class seen and epoch; also the batch size")
    temperature: Scale | None = Field(default=None, description="of the normalised logits; None: not normalised")
    draws: File | None = Field(
        default=None, description="a .safetensors file with every epoch's features, in place of drawing"
    )


class InfLoRASettings(LoRASettings):
    """InfLoRA: adapters designed not to disturb the old tasks."""

    name: Literal["inflora"] = "inflora"
    energy: Share = Field(default=0.95, description="share of input energy the memory keeps, first task")
    energy_end: Share = Field(default=1.0, description="where the threshold would arrive after the last")
    total_tasks: Count | None = Field(default=None, description="T of the schedule; None: the stream's length")
    memory: Literal["dualgpm", "gpm"] = Field(
        default="dualgpm", description="dualgpm keeps the smaller of the old tasks' directions and the free ones"
    )
    energy_of: Literal["covariance", "inputs"] = Field(
        default="covariance", description="sums of squared eigenvalues of the inputs' covariance, or of the inputs"
    )
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
    penalty: Weight = Field(default=0.5, description="weight of the squared products of new and old rows of A")


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
    pool: Prompted = Field(default=10, description="prompts in the pool")
    length: Prompted = Field(default=5, description="tokens per prompt")
    top: Prompted = Field(default=5, description="prompts that an image picks")
    pull: Weight = Field(default=0.5, description="weight of the distance between an image and the keys it picks")

    @model_validator(mode="after")
    def _enough_prompts(self) -> Self:
        if self.top > self.pool:
            raise ValueError(f"top must be at most pool ({self.pool}), got {self.top}")
        return self


class DualPromptSettings(Settings):
    """DualPrompt: prompts common to all tasks in the first blocks, a task's own in the blocks that follow."""

    name: Literal["dualprompt"] = "dualprompt"
    general_blocks: Annotated[Whole, Field(ge=0, le=1_000)] = Field(
        default=2, description="the first n blocks have prompts common to all tasks"
    )
    general_length: Prompted = Field(default=5, description="tokens of a common prompt")
    expert_blocks: Depth = Field(default=3, description="the next n blocks have prompts of every task's own")
    expert_length: Prompted = Field(default=20, description="tokens of a task's own prompt")
    pull: Weight = Field(default=1.0, description="weight of the distance between an image and its task's key")


class CODAPromptSettings(Settings):
    """CODA-Prompt: each image's prompt is a weighted sum of components; every task adds some."""

    name: Literal["codaprompt"] = "codaprompt"
    components: Prompted = Field(default=10, description="components that each task adds")
    length: Annotated[Prompted, Field(ge=2, multiple_of=2)] = Field(
        default=8, description="tokens: half for the keys, half for the values"
    )
    blocks: Depth = Field(default=5, description="prompt the first n blocks")
    orthogonality: Weight = Field(default=0.1, description="weight of the components' squared overlaps")


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
