"""The settings of every adapter: what changes in the backbone while a task is learnt, and what protects old tasks.

An adapter is one settings model here, one line in ``ADAPTERS``, and the class that the model names.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from inflora.config.alternatives import Alternative, Alternatives
from inflora.config.base import Count, Depth, Flag, Rate, Share, Weight, Whole, Width

Target = Literal["q", "k", "v", "attn.proj", "mlp.fc1", "mlp.fc2"]


PromptCount = Annotated[Whole, Field(ge=1, le=1_024)]
"""Prompts, or tokens of one: an image has some hundred tokens of its own, and attention pays for all with all."""


class NoAdapterSettings(Alternative):
    """The backbone stays as it was pre-trained; whatever an adapter gains over this comes from adapting."""

    name: Literal["none"] = "none"
    built_by: ClassVar = "inflora.adapters.base:Adapter"


class AdaptedSettings(Alternative):
    """An adapter that is trained."""

    adapt_tasks: Count | None = Field(default=None, description="adapt during the first n tasks only; None: in all")
    features: Literal["adapted", "both"] = Field(
        default="adapted", description="what classifiers see; both: the frozen model's features beside the adapted's"
    )


class LowRankSettings(AdaptedSettings):
    """Low-rank updates of linear layers in the backbone's blocks."""

    blocks: Depth | None = Field(default=None, description="adapt the first n blocks only; None: all")
    targets: tuple[Target, ...] = Field(default=("k", "v"), min_length=1, description="what is adapted in a block")
    merge: Share = Field(default=1.0, description="share of a task's update that stays when the task ends")
    first_merge: Share | None = Field(default=None, description="of the first task's update; None: as merge")

    @field_validator("targets", mode="before")
    @classmethod
    def _of_text(cls, targets: Any) -> Any:
        """Also as one text, "q,k,v": a search chooses between plain values."""
        return tuple(targets.split(",")) if isinstance(targets, str) else targets

    @field_validator("targets")
    @classmethod
    def _each_once(cls, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        if len(set(targets)) < len(targets):
            raise ValueError("must name each target once")
        return targets

    def share_merged(self, task: int) -> float:
        """The share of the update of ``task`` (from 0) that stays."""
        return self.merge if task or self.first_merge is None else self.first_merge


class FixedRankSettings(LowRankSettings):
    """Updates of one rank."""

    rank: Width = Field(default=10, description="of the adapters: directions that a task may learn in")


class InfLoRASettings(LowRankSettings):
    """InfLoRA: adapters designed not to disturb the old tasks."""

    name: Literal["inflora"] = "inflora"
    built_by: ClassVar = "inflora.adapters.inflora:InfLoRA"
    felt_later: ClassVar = frozenset({"energy", "energy_end", "total_tasks", "memory", "energy_of", "balance"})
    rank: Width | Literal["auto"] = Field(
        default=10, description="of the adapters; auto: each layer's directions that hold energy of what is free"
    )
    train_A: Flag = Field(default=False, description="train A too, among the directions that old tasks leave free")
    energy: Share = Field(default=0.95, description="share of input energy the memory keeps, first task")
    energy_end: Share = Field(default=1.0, description="where the threshold would arrive after the last")
    total_tasks: Count | None = Field(default=None, description="T of the schedule; None: the stream's length")
    memory: Literal["dualgpm", "gpm"] = Field(
        default="dualgpm", description="dualgpm keeps the smaller of the old tasks' directions and the free ones"
    )
    energy_of: Literal["covariance", "inputs"] = Field(
        default="covariance", description="sums of squared eigenvalues of the inputs' covariance, or of the inputs"
    )
    balance: Weight | None = Field(
        default=None,
        description="weight of an old task's image (a new one's: 1) where updates are merged; None: merged as learnt",
    )

    @model_validator(mode="after")
    def _threshold_rises(self) -> Self:
        if self.energy_end < self.energy:
            raise ValueError(f"energy_end must be at least energy ({self.energy}), got {self.energy_end}")
        return self


class LoRASettings(FixedRankSettings):
    """Plain LoRA, trained task after task with nothing protected: the lower bound of methods that adapt."""

    name: Literal["lora"] = "lora"
    built_by: ClassVar = "inflora.adapters.lora:LoRA"


class OLoRASettings(FixedRankSettings):
    """O-LoRA: plain LoRA whose new A is pulled towards being orthogonal to the old ones."""

    name: Literal["olora"] = "olora"
    built_by: ClassVar = "inflora.adapters.olora:OLoRA"
    penalty: Weight = Field(default=0.5, description="weight of the squared products of new and old rows of A")


class SDLoRASettings(FixedRankSettings):
    """SD-LoRA: old directions are kept, their magnitudes go on learning."""

    name: Literal["sdlora"] = "sdlora"
    built_by: ClassVar = "inflora.adapters.sdlora:SDLoRA"
    felt_later: ClassVar = frozenset({"magnitude_lr"})
    magnitude_lr: Rate | None = Field(default=1e-3, description="of old magnitudes, which begin at 1; None: optim.lr")


class E2LoRASettings(LowRankSettings):
    """E2-LoRA: a new task writes to outputs that old tasks' updates hardly use, and these updates let go of them."""

    name: Literal["e2lora"] = "e2lora"
    built_by: ClassVar = "inflora.adapters.e2lora:E2LoRA"
    targets: tuple[Target, ...] = Field(
        default=("q", "k", "v", "mlp.fc1"), min_length=1, description="what is adapted in a block"
    )


class PromptSettings(AdaptedSettings):
    """Prompts, and what is compared with an image's query to choose or weigh them."""

    key_lr: Rate | None = Field(default=None, description="of the keys; None: optim.lr")
    prompt_lr: Rate | None = Field(default=None, description="of the prompts; None: optim.lr")


class L2PSettings(PromptSettings):
    """L2P: a pool of prompts, of which each image picks those with the nearest keys."""

    name: Literal["l2p"] = "l2p"
    built_by: ClassVar = "inflora.adapters.prompts.l2p:L2P"
    pool: PromptCount = Field(default=10, description="prompts in the pool")
    length: PromptCount = Field(default=5, description="tokens per prompt")
    top: PromptCount = Field(default=5, description="prompts that an image picks")
    pull: Weight = Field(default=0.5, description="weight of the distance between an image and the keys it picks")

    @model_validator(mode="after")
    def _enough_prompts(self) -> Self:
        if self.top > self.pool:
            raise ValueError(f"top must be at most pool ({self.pool}), got {self.top}")
        return self


class DualPromptSettings(PromptSettings):
    """DualPrompt: prompts common to all tasks in the first blocks, a task's own in the blocks that follow."""

    name: Literal["dualprompt"] = "dualprompt"
    built_by: ClassVar = "inflora.adapters.prompts.dualprompt:DualPrompt"
    general_blocks: Annotated[Whole, Field(ge=0, le=1_000)] = Field(
        default=2, description="the first n blocks have prompts common to all tasks"
    )
    general_length: PromptCount = Field(default=5, description="tokens of a common prompt")
    expert_blocks: Depth = Field(default=3, description="the next n blocks have prompts of every task's own")
    expert_length: PromptCount = Field(default=20, description="tokens of a task's own prompt")
    pull: Weight = Field(default=1.0, description="weight of the distance between an image and its task's key")
    # A key has but its own task's steps to come to that task's queries: at the prompts' rate it would not.
    key_lr: Rate | None = Field(default=0.01, description="of the keys; None: optim.lr")


class CODAPromptSettings(PromptSettings):
    """CODA-Prompt: each image's prompt is a weighted sum of components; every task adds some."""

    name: Literal["codaprompt"] = "codaprompt"
    built_by: ClassVar = "inflora.adapters.prompts.codaprompt:CODAPrompt"
    components: PromptCount = Field(default=10, description="components that each task adds")
    length: Annotated[PromptCount, Field(ge=2, multiple_of=2)] = Field(
        default=8, description="tokens: half for the keys, half for the values"
    )
    blocks: Depth = Field(default=5, description="prompt the first n blocks")
    orthogonality: Weight = Field(
        default=0.0, description="weight of the mean squared overlap of components, keys and attentions, in each block"
    )
    key_lr: Rate | None = Field(default=None, description="of the keys and attentions; None: optim.lr")


ADAPTERS = Alternatives(
    "inflora.adapters",
    NoAdapterSettings,
    LoRASettings,
    InfLoRASettings,
    OLoRASettings,
    SDLoRASettings,
    E2LoRASettings,
    L2PSettings,
    DualPromptSettings,
    CODAPromptSettings,
)
