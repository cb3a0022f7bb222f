"""The experiments of the InfLoRA paper (CVPR 2024) by name, with the published settings, and what they gave there.

A preset trains on all training images and is judged on the test images, as in the paper. ``for_tuning`` holds out
validation images instead: the base of a sweep.
"""

from typing import NamedTuple

from inflora.config import (
    AlignedSettings,
    BackboneSettings,
    ConfigError,
    DataSettings,
    InfLoRASettings,
    LinearSettings,
    OptimSettings,
    RunConfig,
    override,
)


class Published(NamedTuple):
    """Accuracies in percent; ``spread``, where known: the standard deviation of ``final`` over ``seeds`` runs."""

    final: float
    avg_incremental: float
    source: str
    spread: float | None = None
    seeds: int | None = None


class Preset(NamedTuple):
    """One experiment of the paper."""

    config: RunConfig
    published: tuple[Published, ...] = ()


PAPER, LOGS = "the paper", "the authors' released logs"
# ViT-B/16, supervised on ImageNet-21k.
_BACKBONE = BackboneSettings(name="vit_base_patch16_224.augreg_in21k")


def _preset(
    data: DataSettings,
    adapter: InfLoRASettings,
    optim: OptimSettings,
    *published: Published,
    classifier: LinearSettings | AlignedSettings = LinearSettings(),  # noqa: B008 - a frozen value
) -> Preset:
    run = RunConfig(data=data, backbone=_BACKBONE, adapter=adapter, classifier=classifier, optim=optim)
    return Preset(run, published)


def _cifar100() -> DataSettings:
    return DataSettings(dataset="cifar100", tasks=10, train_on="train+validation")


def _imagenet_r(tasks: int) -> DataSettings:
    return DataSettings(dataset="imagenet_r", tasks=tasks, train_on="train+validation", eval_resize=256)


def _domainnet() -> DataSettings:
    return DataSettings(dataset="domainnet", tasks=5, train_on="train+validation", eval_resize=256)


def _adam(epochs: int, lr: float = 5e-4) -> OptimSettings:
    return OptimSettings(name="adam", lr=lr, epochs=epochs, batch_size=128)


_ALIGNED = AlignedSettings(epochs=5, temperature=0.1)
_STEPPED_SGD = OptimSettings(
    name="sgd", lr=5e-3, head_lr=1e-2, schedule="step", milestones=(4,), epochs=5, batch_size=128
)

PRESETS: dict[str, Preset] = {
    "cifar100-10": _preset(
        _cifar100(),
        InfLoRASettings(rank=10, energy=0.95),
        _adam(20),
        Published(86.51, 91.70, PAPER),
        Published(86.33, 91.18, LOGS, spread=0.81, seeds=5),
    ),
    "imagenet-r-5": _preset(
        _imagenet_r(5), InfLoRASettings(rank=10, energy=0.98), _adam(50), Published(77.52, 82.01, PAPER)
    ),
    "imagenet-r-10": _preset(
        _imagenet_r(10),
        InfLoRASettings(rank=10, energy=0.98),
        _adam(50),
        Published(75.65, 80.82, PAPER),
        Published(75.34, 80.60, LOGS, spread=0.25, seeds=5),
    ),
    "imagenet-r-20": _preset(
        _imagenet_r(20), InfLoRASettings(rank=10, energy=0.98), _adam(50), Published(71.01, 77.28, PAPER)
    ),
    "domainnet-5": _preset(
        _domainnet(), InfLoRASettings(rank=30, energy=0.95, memory="gpm"), _STEPPED_SGD, Published(74.53, 79.57, PAPER)
    ),
    "cifar100-10-b5": _preset(
        _cifar100(), InfLoRASettings(rank=10, energy=0.95, blocks=5, memory="gpm"), _adam(20, lr=1e-3)
    ),
    "imagenet-r-10-b5": _preset(
        _imagenet_r(10), InfLoRASettings(rank=10, energy=0.99, blocks=5, memory="gpm"), _adam(50)
    ),
    # The authors' run also begins with a new final norm; here the pre-trained one stays, as everywhere.
    "cifar100-10-ca": _preset(
        _cifar100(),
        InfLoRASettings(rank=5, energy=0.95, memory="gpm"),
        OptimSettings(
            name="sgd",
            lr=1e-3,
            head_lr=1e-2,
            weight_decay=1e-3,
            schedule="step",
            milestones=(18,),
            epochs=20,
            batch_size=128,
        ),
        classifier=_ALIGNED,
    ),
    # One rate for all, no weight decay: as in the authors' configuration.
    "imagenet-r-10-ca": _preset(
        _imagenet_r(10),
        InfLoRASettings(rank=10, energy=0.95, memory="gpm"),
        OptimSettings(name="sgd", lr=1e-3, epochs=50, batch_size=128),
        classifier=_ALIGNED,
    ),
}


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown --preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def for_tuning(name: str) -> RunConfig:
    """A preset's config with its validation images held out."""
    return override(find_preset(name).config, {"data.train_on": "train"})


def comparison(published: Published, final: float, avg_incremental: float) -> list[str]:
    """A run's accuracies (in percent) beside the published ones, and whether the final one lies within their spread."""
    spread = "" if published.spread is None else f" ± {published.spread:.2f} over {published.seeds} seeds"
    gap, average = final - published.final, published.avg_incremental
    shown = f"final {published.final:.2f}{spread}, average incremental {average:.2f}"
    lines = [f"{published.source}: {shown}; this run: {final:.2f}, {avg_incremental:.2f}"]
    if published.spread is None:
        return [
            *lines,
            f"  {gap:+.2f} points on the final accuracy; no spread is published to say whether that is much",
        ]
    bound = 2 * published.spread
    within = "within" if abs(gap) <= bound else "outside"
    return [*lines, f"  {gap:+.2f} points on the final accuracy: {within} two standard deviations ({bound:.2f})"]
