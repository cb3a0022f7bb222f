"""The settings of every classifier: how features are told apart.

A classifier is one settings model here, one line in ``CLASSIFIERS``, and the class that the model names.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from inflora.config.alternatives import Alternative, Alternatives
from inflora.config.base import Epochs, Part, Rate, Scale, Weight, Whole, Width

Drift = Annotated[
    Weight | None, Field(description="ridge of the map by which old classes follow the features; None: not")
]
"""Drift compensation (arXiv 2511.09926), of classifiers that remember statistics of old classes."""

Views = Annotated[
    Whole, Field(ge=0, le=100, description="augmented looks at each image that it is fitted to, besides the plain one")
]
"""Few images say little about how the features of a class spread; each look costs a forward pass of them."""


class LinearSettings(Alternative):
    """One linear layer per task, trained with the adapter (``optim.head_lr``, ``optim.head_init``)."""

    name: Literal["linear"] = "linear"
    built_by: ClassVar = "inflora.classifiers.linear:Linear"


class AlignedSettings(Alternative):
    """Linear layers that, after each task but the first, learn together on features drawn from Gaussians."""

    name: Literal["aligned"] = "aligned"
    built_by: ClassVar = "inflora.classifiers.aligned:Aligned"
    felt_later: ClassVar = frozenset({"epochs", "steps", "lr", "weight_decay", "samples", "temperature", "drift"})
    epochs: Epochs = Field(default=5, description="of drawn features, after each task")
    steps: Epochs | None = Field(default=None, description="at least so many updates, in the place of epochs")
    lr: Rate = Field(default=0.01, description="of the alignment, with SGD")
    weight_decay: Weight = Field(default=5e-4, description="of the alignment")
    samples: Width = Field(default=256, description="features drawn per class seen and epoch; also the batch size")
    temperature: Scale | None = Field(default=None, description="of the normalised logits; None: not normalised")
    drift: Drift = None
    views: Views = 0

    def epochs_of(self, classes: int) -> int:
        """Epochs with so many classes: an update for each of them makes one."""
        return self.epochs if self.steps is None else -(-self.steps // classes)


class FittedSettings(Alternative):
    """Found in closed form after each task; an adapter learns with a linear layer that is then thrown away."""

    felt_later: ClassVar = frozenset({"drift"})
    drift: Drift = None
    views: Views = 0


class NCMSettings(FittedSettings):
    """The class whose mean feature is nearest."""

    name: Literal["ncm"] = "ncm"
    built_by: ClassVar = "inflora.classifiers.ncm:NCM"


class LDASettings(FittedSettings):
    """Classes as Gaussians of one covariance."""

    name: Literal["lda"] = "lda"
    built_by: ClassVar = "inflora.classifiers.lda:LDA"
    shrinkage: Part | None = Field(
        default=None, description="of the covariance towards equal variances; None: as suits so many images"
    )


class QDASettings(FittedSettings):
    """Classes as Gaussians, each of its own covariance."""

    name: Literal["qda"] = "qda"
    built_by: ClassVar = "inflora.classifiers.qda:QDA"
    pooling: Part = Field(default=0.9, description="of every class's covariance towards the common one")
    shrinkage: Part | None = Field(
        default=0.1, description="then towards equal variances; None: as suits so many images"
    )


class RanPACSettings(FittedSettings):
    """Ridge regression on random features; the ridge is chosen on held-out training images."""

    name: Literal["ranpac"] = "ranpac"
    built_by: ClassVar = "inflora.classifiers.ranpac:RanPAC"
    features: Width = Field(default=1_000, description="random ones, M: it keeps M x M numbers; the paper has 10,000")


CLASSIFIERS = Alternatives(
    "inflora.classifiers",
    LinearSettings,
    AlignedSettings,
    NCMSettings,
    LDASettings,
    QDASettings,
    RanPACSettings,
)
