"""A backbone, an adapter and a classifier put together as a config says."""

from typing import Any

from torch import nn

from inflora.adapters import Adapter, make_adapter
from inflora.backbone import shape_of
from inflora.classifiers import make_classifier
from inflora.config import Precision, RunConfig
from inflora.model import ContinualModel


def make_learner(
    config: RunConfig, backbone: nn.Module, precision: Precision = "fp32"
) -> tuple[ContinualModel, Adapter[Any]]:
    """The model before its first task, and the adapter that has prepared it.

    Raises:
        ConfigError: The adapter does not fit the backbone.
    """
    both = getattr(config.adapter, "features", "adapted") == "both"
    width = shape_of(backbone).width * (2 if both else 1)
    model = ContinualModel(backbone, make_classifier(config.classifier, width), precision)
    adapter = make_adapter(config.adapter)
    adapter.prepare(model)
    if both:
        model.keep_frozen()
    return model, adapter
