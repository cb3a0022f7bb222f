"""The settings of every classifier: how features are told apart.

A classifier is one settings model here, one line in ``CLASSIFIERS``, and the class that the model names.
"""

from typing import ClassVar, Literal

from pydantic import Field

from inflora.config.alternatives import Alternative, Alternatives
from inflora.config.base import Epochs, Rate, Scale, Weight, Width


class LinearSettings(Alternative):
    """One linear layer per task, trained with the adapter (``optim.head_lr``, ``optim.head_init``)."""

    name: Literal["linear"] = "linear"
    built_by: ClassVar = "inflora.classifiers.linear:Linear"


class AlignedSettings(Alternative):
    """Linear layers that, after each task but the first, learn together on features drawn from Gaussians."""

    name: Literal["aligned"] = "aligned"
    built_by: ClassVar = "inflora.classifiers.aligned:Aligned"
    felt_later: ClassVar = frozenset({"epochs", "lr", "weight_decay", "samples", "temperature"})
    epochs: Epochs = Field(default=5, description="of drawn features, after each task")
    lr: Rate = Field(default=0.01, description="of the alignment, with SGD")
    weight_decay: Weight = Field(default=5e-4, description="of the alignment")
    samples: Width = Field(default=256, description="features drawn per class seen and epoch; also the batch size")
    temperature: Scale | None = Field(default=None, description="of the normalised logits; None: not normalised")


class NCMSettings(Alternative):
    """The class whose mean feature is nearest; an adapter learns with a linear layer that is then thrown away."""

    name: Literal["ncm"] = "ncm"
    built_by: ClassVar = "inflora.classifiers.ncm:NCM"


CLASSIFIERS = Alternatives(
    "inflora.classifiers",
    LinearSettings,
    AlignedSettings,
    NCMSettings,
)
