"""A sweep in small: generated images in the dataset's own form, a tiny transformer, the CPU, two trials.

Every step of the real path runs: archive, preparation, sweep, export, training. The numbers mean nothing.
"""

from pathlib import Path

from inflora.config import BackboneSettings, DualPromptSettings, RanPACSettings, Settings, override
from inflora.data import DATASETS, prepare_store
from inflora.data.samples import SAMPLES
from inflora.data.source import Options
from sweeps.engine.space.spec import Budget, Resources, Sweep

_CLASSES_PER_TASK, _IMAGES_PER_CLASS = 2, 8
_HEAD_WIDTH, _RANDOM_FEATURES = 64, 100


def shrink(sweep: Sweep, root: Path) -> Sweep:
    """The sweep with the same space over a run of seconds, on the dataset's sample store below ``root``."""
    sample = root / f"{sweep.base.data.dataset}-{sweep.base.data.task_count}"
    settings = {"data.root": str(sample), "data.validation": 0.25, "optim.epochs": 1, "optim.batch_size": 16}
    if isinstance(sweep.base.classifier, RanPACSettings):
        settings["classifier.features"] = min(sweep.base.classifier.features, _RANDOM_FEATURES)
    base = override(sweep.base, {**settings, "device": "cpu"}).model_copy(update={"backbone": _backbone_for(sweep)})
    changes = {
        "name": f"{sweep.name}-smoke",
        "base": base,
        "trials": 2,
        "budget": Budget(),
        "resources": Resources(),
    }
    return sweep.model_copy(update=changes)


def _backbone_for(sweep: Sweep) -> BackboneSettings:
    """A tiny transformer, wide and deep enough for every setting of the sweep's space."""
    adapters = [config.adapter for config in sweep.extreme_configs()]
    heads = -(-max(getattr(adapter, "rank", 1) for adapter in adapters) // _HEAD_WIDTH)
    depth = max(2, *(_blocks(adapter) for adapter in adapters))
    sizes = {"embed_dim": _HEAD_WIDTH * heads, "depth": depth, "num_heads": heads}
    return BackboneSettings(
        name="vit_tiny_patch16_224", pretrained=False, options={"img_size": 32, "patch_size": 16, **sizes}
    )


def _blocks(adapter: Settings) -> int:
    """The number of the backbone's blocks that an adapter names."""
    if isinstance(adapter, DualPromptSettings):
        return adapter.general_blocks + adapter.expert_blocks
    return getattr(adapter, "blocks", None) or 0


def prepare_sample(sweep: Sweep) -> None:
    """Write a tiny distribution of the dataset of a sweep ``shrink`` and prepare the store that the sweep reads."""
    data = sweep.base.data
    assert data.root is not None
    root = Path(data.root)
    if data.dataset not in SAMPLES or (root / data.dataset).exists():
        return
    folder = root / "source"
    folder.mkdir(parents=True, exist_ok=True)
    source = SAMPLES[data.dataset](folder, _CLASSES_PER_TASK * data.task_count, _IMAGES_PER_CLASS)
    prepare_store(data.dataset, DATASETS[data.dataset], source, Options(), data.root, subset=True)
