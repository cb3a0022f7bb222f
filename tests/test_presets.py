"""Published experiments by name, and what is said of a run's numbers beside the published ones."""

import json
from pathlib import Path
from statistics import fmean, stdev

import pytest
import yaml
from typer.testing import CliRunner

from inflora.adapters import make_adapter
from inflora.backbone import meta_backbone
from inflora.classifiers import make_classifier
from inflora.cli import app, beside_published
from inflora.config import (
    AlignedSettings,
    ConfigError,
    LinearSettings,
    dump_config,
    method_of,
    override,
    parse_config,
)
from inflora.data import DATASETS, prepare_store
from inflora.data.manifest import read_manifest
from inflora.data.samples import cifar100
from inflora.data.source import Options
from inflora.model import ContinualModel
from inflora.presets import FIELD, LOGS, OURS, PAPER, PRESETS, Published, comparison, find_preset, for_tuning

METRICS = {"acc/final": 0.8600, "acc/avg_incremental": 0.9100}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_on_all_images_and_its_tuning_form_holds_some_out(name):
    config = PRESETS[name].config
    assert config.data.train_on == "train+validation"
    assert for_tuning(name) == override(config, {"data.train_on": "train"})


# Final / average incremental accuracies, as printed.
PRINTED = """
imagenet-r-20-l2p           57.92/64.57   cifar100-10-l2p           82.48/87.64   domainnet-5-l2p         70.16/75.60
imagenet-r-5-dualprompt     67.88/71.16   imagenet-r-10-dualprompt  65.41/69.39   imagenet-r-20-dualprompt 61.00/65.80
cifar100-10-dualprompt      84.42/90.06   domainnet-5-dualprompt    72.14/77.71
imagenet-r-5-codaprompt     73.09/76.91   imagenet-r-10-codaprompt  71.47/75.82   imagenet-r-20-codaprompt 67.28/72.34
cifar100-10-codaprompt      86.62/91.08   domainnet-5-codaprompt    72.33/78.72
imagenet-r-5                77.52/82.01   imagenet-r-10             75.65/80.82   imagenet-r-20           71.01/77.28
cifar100-10                 86.51/91.70   domainnet-5               74.53/79.57
cifar100-10-pycil           86.51/91.70   imagenet-r-10-pycil       75.65/80.82   cub200-10-pycil         70.82/81.39
cifar100-10-pycil-sdlora    88.01/92.54   imagenet-r-10-pycil-sdlora 77.34/82.04  cub200-10-pycil-sdlora  77.48/85.59
cifar100-50-pycil           56.65/70.29   imagenet-r-50-pycil       60.49/69.95   imagenet-a-10-pycil     46.28/58.50
imagenet-r-20-pycil-sdlora-in1k 74.64/80.58
"""


def test_every_published_row_is_a_preset_with_the_printed_numbers():
    words = PRINTED.split()
    printed = {name: tuple(map(float, pair.split("/"))) for name, pair in zip(words[::2], words[1::2], strict=True)}
    papers = {name: preset.published for name, preset in PRESETS.items() if name not in ours()}
    assert {name: published[0][:2] for name, published in papers.items() if published} == printed


RECORDED = json.loads((Path(__file__).parents[1] / "benchmarks" / "pairs.json").read_text())


def ours() -> dict[str, tuple[str, str]]:
    """Presets of docs/results.md -> stream and pair there; the tiny one is in no table."""
    names = {name: name.split("-") for name in PRESETS if name.startswith(("digits", "strokes", "woven"))}
    return {name: (stream, f"inflora + {classifier}") for name, (stream, _, classifier) in names.items()}


@pytest.mark.parametrize("name", [name for name in ours() if name != "digits-5-tiny"])
def test_a_preset_of_ours_has_the_settings_and_the_numbers_that_are_recorded(name):
    stream, pair = ours()[name]
    recorded, preset = RECORDED[stream][pair], PRESETS[name]
    label, *settings = recorded["classifier"].split(" ")
    chosen = {f"classifier.{key}": yaml.safe_load(value) for key, value in (each.split("=") for each in settings)}
    chosen = {key: None if value == "None" else value for key, value in chosen.items()}
    assert override(preset.config, {**recorded["changes"], **chosen}) == preset.config
    assert preset.config.classifier.name == label
    final, average = (
        [100 * test[metric] for test in recorded["tests"][:3]] for metric in ("acc/final", "acc/avg_incremental")
    )
    shown = round(fmean(final), 2), round(fmean(average), 2), OURS, round(stdev(final), 2), 3
    assert preset.published == (Published(*shown),)


@pytest.mark.parametrize("name", PRESETS)
def test_two_tables_are_never_mixed(name):
    """Neither their numbers nor what they were measured on: each has a class order of its own."""
    sources = {published.source for published in PRESETS[name].published}
    of_the_field = "-pycil" in name
    assert sources <= ({OURS} if name in ours() else {FIELD} if of_the_field else {PAPER, LOGS})
    assert PRESETS[name].config.data.order == ("pycil-1993" if of_the_field else None)
    assert PRESETS[name].config.data.order_seed == (1993 if name in ours() else None)


CLASSES = {
    "digits": 10,
    "strokes": 20,
    "woven": 24,
    "cifar100": 100,
    "imagenet_r": 200,
    "imagenet_a": 200,
    "cub200": 200,
    "domainnet": 345,
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_its_dataset_and_its_backbone(name):
    config = PRESETS[name].config
    assert CLASSES[config.data.dataset] % config.data.tasks == 0
    assert config.data.dataset.replace("_", "-") + f"-{config.data.tasks}" == "-".join(
        name.split("-")[: 3 if "imagenet" in name else 2]
    )
    assert config.data.dataset in DATASETS
    backbone = meta_backbone(config.backbone)
    make_adapter(config.adapter).prepare(
        ContinualModel(backbone, make_classifier(config.classifier, backbone.embed_dim))
    )


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith(("l2p", "dualprompt", "codaprompt"))])
def test_the_papers_baselines_train_as_codaprompts_experiments_do(name):
    config = PRESETS[name].config
    epochs = {"cifar100": 20, "imagenet_r": 50, "domainnet": 5}[config.data.dataset]
    optim, adapter = config.optim, config.adapter
    assert (optim.name, optim.lr, optim.batch_size, optim.epochs) == ("adam", 1e-3, 128, epochs)
    assert (optim.head_lr, adapter.key_lr, adapter.prompt_lr) == (None, None, None)
    if adapter.name == "codaprompt":
        assert (adapter.components * config.data.tasks, adapter.length, adapter.orthogonality) == (100, 8, 0)
    assert method_of(config) == adapter.name


@pytest.mark.parametrize("name", [name for name in PRESETS if "sdlora" in name])
def test_sdlora_trains_as_released(name):
    config = PRESETS[name].config
    optim, adapter = config.optim, config.adapter
    assert (optim.name, optim.schedule, optim.epochs, optim.batch_size) == ("sgd", "constant", 20, 128)
    assert (optim.lr, optim.weight_decay) == (8e-3 if config.data.dataset == "cifar100" else 1e-2, 0)
    assert (adapter.rank, adapter.targets, adapter.magnitude_lr) == (10, ("q", "v"), None)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        # dataset, tasks, rank, energy, optimiser, lr, epochs, shorter side of evaluation
        ("cifar100-10", ("cifar100", 10, 10, 0.95, "adam", 5e-4, 20, None)),
        ("imagenet-r-5", ("imagenet_r", 5, 10, 0.98, "adam", 5e-4, 50, 256)),
        ("imagenet-r-10", ("imagenet_r", 10, 10, 0.98, "adam", 5e-4, 50, 256)),
        ("imagenet-r-20", ("imagenet_r", 20, 10, 0.98, "adam", 5e-4, 50, 256)),
        ("domainnet-5", ("domainnet", 5, 30, 0.95, "sgd", 5e-3, 5, 256)),
    ],
)
def test_a_preset_is_the_papers_setting(name, settings):
    config = PRESETS[name].config
    data, adapter, optim = config.data, config.adapter, config.optim
    found = (
        data.dataset,
        data.tasks,
        adapter.rank,
        adapter.energy,
        optim.name,
        optim.lr,
        optim.epochs,
        data.eval_resize,
    )
    assert found == settings
    assert (optim.batch_size, adapter.energy_end, data.order_seed) == (128, 1.0, None)
    assert (data.mean, data.std, data.augment.scale, data.augment.flip) == (0.0, 1.0, (0.08, 1.0), True)
    assert config.backbone.name == "vit_base_patch16_224.augreg_in21k"


@pytest.mark.parametrize("name", ["domainnet-5", *(name for name in PRESETS if name.endswith(("b5", "ca")))])
def test_the_variants_were_published_with_gpm_memory(name):
    config = PRESETS[name].config
    assert config.adapter.memory == "gpm"
    assert (config.adapter.blocks == 5) == name.endswith("b5")
    assert config.classifier == (
        AlignedSettings(epochs=5, temperature=0.1) if name.endswith("ca") else LinearSettings()
    )
    assert method_of(config) == ("inflora-ca" if name.endswith("ca") else "inflora")


def test_a_result_is_called_within_or_outside_the_published_spread():
    published = Published(86.33, 91.18, "logs", spread=0.81, seeds=5)
    (line, verdict) = comparison(published, 86.0, 91.0)
    assert line == "logs: final 86.33 ± 0.81 over 5 seeds, average incremental 91.18; this run: 86.00, 91.00"
    assert "-0.33 points on the final accuracy: within two standard deviations (1.62)" in verdict
    assert "+1.97 points on the final accuracy: outside" in comparison(published, 88.3, 91.0)[1]


def test_a_spread_of_nobody_knows_how_many_seeds_is_told_without_them():
    (line, verdict) = comparison(Published(56.65, 70.29, "a table", spread=5.55), 60.0, 71.0)
    assert line.startswith("a table: final 56.65 ± 5.55, average incremental 70.29; this run")
    assert "within two standard deviations (11.10)" in verdict


def test_without_a_published_spread_no_verdict_is_given():
    (_, verdict) = comparison(Published(77.52, 82.01, "the paper"), 75.0, 80.0)
    assert "-2.52 points" in verdict and "no spread is published" in verdict


@pytest.fixture
def whole(tmp_path):
    """A root with a store that says it is the whole CIFAR-100."""
    prepare_store("cifar100", DATASETS["cifar100"], cifar100(tmp_path, 2, 2), Options(), str(tmp_path), subset=True)
    declare(tmp_path, whole=True)
    return tmp_path


def declare(root: Path, whole: bool) -> None:
    """Let CIFAR-100's store say that it is the whole of it, or a part."""
    manifest = read_manifest(root / "cifar100").model_copy(update={"whole": whole}).sealed()
    (root / "cifar100" / "manifest.json").write_text(manifest.model_dump_json())


@pytest.mark.parametrize("change", [{"seed": 3}, {"device": "cpu"}])
def test_another_seed_or_place_is_still_the_published_experiment(change, whole):
    config = override(find_preset("cifar100-10").config, {**change, "data.root": str(whole)})
    assert beside_published("cifar100-10", config, "test", METRICS)[0].startswith("the paper: final 86.51")


@pytest.mark.parametrize(
    "change", [{"adapter.rank": 11}, {"classifier": "ncm"}, {"optim.epochs": 1}, {"data.tasks": 20}]
)
def test_other_settings_are_not_compared(change):
    config = override(find_preset("cifar100-10").config, change)
    (line,) = beside_published("cifar100-10", config, "test", METRICS)
    assert line.startswith("not compared with the published cifar100-10: other settings")


def test_other_weights_and_a_part_of_the_dataset_are_not_compared(whole):
    config = override(find_preset("cifar100-10").config, {"data.root": str(whole)})
    other = override(config, {"backbone.weights": "dino.pth"})
    assert (
        "the backbone's weights are a file of one's own" in beside_published("cifar100-10", other, "test", METRICS)[0]
    )
    declare(whole, whole=False)
    assert "is not the whole dataset" in beside_published("cifar100-10", config, "test", METRICS)[0]


def test_results_on_validation_images_are_not_compared():
    config = for_tuning("cifar100-10")
    assert beside_published("cifar100-10", config, "validation", METRICS)[0].startswith(
        "not compared with the published"
    )


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown preset 'cifar10'; known: cifar100-10, .*domainnet-5"):
        find_preset("cifar10")


def test_a_preset_can_be_written_as_a_config_file_and_read_again():
    for preset in PRESETS.values():
        assert parse_config(yaml.safe_load(dump_config(preset.config))) == preset.config


def test_a_preset_whose_dataset_is_not_prepared_says_how_to(tmp_path):
    arguments = ["train", "--preset", "cifar100-10", f"data.root={tmp_path}", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "inflora data prepare cifar100 --source PATH" in result.stderr


@pytest.mark.parametrize("arguments", [[], ["seed=1"]])
def test_train_needs_a_config_or_a_preset(arguments):
    result = CliRunner().invoke(app, ["train", *arguments])
    assert result.exit_code == 2
    assert "give a CONFIG file or --preset, one of cifar100-10" in result.stderr
