"""The streams whose learning curves are recorded, to judge searches on: six to choose on, six to prove on.

They differ in kind, not only in order: real digits and three families of generated images, 4 to 20 tasks, linear heads
and classifiers in closed form, validation sets of 480 to 810 images. The adapter is InfLoRA as published, and its three
settings are searched.
The division was fixed before any searcher was run on any of them.
"""

from pathlib import Path
from typing import Any, NamedTuple

from streams import letter, letters

from inflora.config import AugmentSettings, DataSettings, OptimSettings, RunConfig, load_config, override
from inflora.data import DATASETS, prepare_store
from inflora.data.generated import cloth, curves, generated, stroke, weaves
from inflora.data.source import Dataset, Options
from sweeps.recipe import Integer, NearOne, Real, Sweep

SPACE = {
    "adapter.rank": Integer(low=4, high=64, log=True),
    "adapter.energy": NearOne(low=0.9, high=0.9999),
    "optim.lr": Real(low=5e-4, high=2e-2, log=True),
}
PAPER = {"adapter.rank": 10, "adapter.energy": 0.95, "optim.lr": 5e-4}
"""The paper's setting for CIFAR-100: the first that a sweep tries."""


SIDE = 16
"""Pixels that the backbone sees: a quarter of its own, so that a run takes a second or two."""


class Recorded(NamedTuple):
    """A stream to record: its run without the settings that are searched, and where its images come from."""

    base: RunConfig
    images: Dataset | None = None

    def prepare(self, root: Path) -> None:
        """Write its store below ``root``, unless it is there or needs none."""
        name = self.base.data.dataset
        if self.images is not None and not (root / name).exists():
            prepare_store(name, self.images, Path(), Options(), str(root))

    def sweep(self, name: str) -> Sweep:
        """The search whose trials are recorded."""
        return Sweep(name=name, base=self.base, space=dict(SPACE), first=(dict(PAPER),), trials=24)


def _recorded(
    dataset: str,
    images: Dataset,
    tasks: int | tuple[int, ...],
    classifier: dict[str, Any],
    *,
    epochs: int,
    held_out: float,
    order: int,
) -> Recorded:
    augment = AugmentSettings(scale=(0.8, 1.0), flip=False)
    data = DataSettings(dataset=dataset, tasks=tasks, order_seed=order, validation=held_out, augment=augment)
    optim = OptimSettings(batch_size=16, head_init="zero", epochs=epochs)
    base = override(RunConfig(data=data, optim=optim, device="cpu"), {"classifier": classifier})
    return Recorded(override(base, {"backbone.options": {"img_size": SIDE}}), images)


LINEAR, LDA, RANPAC = {"name": "linear"}, {"name": "lda"}, {"name": "ranpac", "features": 500}
DIGITS = ("digits", DATASETS["digits"])
STROKES = ("table-strokes", generated(20, 54, 25, curves, stroke))
MANY_STROKES = ("table-many-strokes", generated(40, 24, 12, curves, stroke))
WOVEN = ("table-woven", generated(24, 42, 20, weaves, cloth))
LETTERS = ("table-letters", generated(40, 26, 12, letters, letter))

CHOOSING = {
    "digits-5-linear": _recorded(*DIGITS, 5, LINEAR, epochs=3, held_out=0.6, order=1993),
    "digits-5-ranpac": _recorded(*DIGITS, 5, RANPAC, epochs=3, held_out=0.6, order=3),
    "strokes-10-linear": _recorded(*STROKES, 10, LINEAR, epochs=3, held_out=0.63, order=0),
    "strokes-20-lda": _recorded(*MANY_STROKES, 20, LDA, epochs=3, held_out=0.5, order=1),
    "woven-6-lda": _recorded(*WOVEN, 6, LDA, epochs=4, held_out=0.52, order=2),
    "letters-10-linear": _recorded(*LETTERS, 10, LINEAR, epochs=4, held_out=0.54, order=0),
}
"""What is chosen on: samplers, early stopping, portfolios."""
PROVING = {
    "digits-4-linear": _recorded(*DIGITS, (4, 2, 2, 2), LINEAR, epochs=3, held_out=0.6, order=2),
    "digits-5-lda": _recorded(*DIGITS, 5, LDA, epochs=3, held_out=0.6, order=1),
    "strokes-5-linear": _recorded(*STROKES, 5, LINEAR, epochs=3, held_out=0.63, order=3),
    "woven-8-ranpac": _recorded(*WOVEN, 8, RANPAC, epochs=4, held_out=0.52, order=0),
    "woven-12-lda": _recorded(*WOVEN, 12, LDA, epochs=4, held_out=0.52, order=1),
    "letters-20-linear": _recorded(*LETTERS, 20, LINEAR, epochs=3, held_out=0.54, order=2),
}
"""What the choice is proved on, once."""
STREAMS = CHOOSING | PROVING


def stream_named(name: str) -> Recorded:
    """One of the streams here, or a user's own: the run in a YAML file, on a dataset that is prepared."""
    if name in STREAMS:
        return STREAMS[name]
    return Recorded(load_config(Path(name)))
