"""Classifiers tell features apart; each has its settings model in ``inflora.config.classifiers``."""

from typing import Any

from inflora.classifiers.base import Classifier
from inflora.config import Alternative, build

__all__ = ["Classifier", "make_classifier"]


def make_classifier(settings: Alternative, width: int) -> Classifier[Any]:
    """The classifier that ``settings`` describes, of features of ``width`` numbers, before its first task."""
    classifier: Classifier[Any] = build(settings, width)
    return classifier
