"""A run's folder as a model: the run's own answers, from the folder alone."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import inflora
from inflora.backbone import build_backbone
from inflora.config import METHODS, RunConfig, load_config, override
from inflora.continual import TaskResult
from inflora.data import prepare_store, samples
from inflora.data.domainnet import read as read_domainnet
from inflora.data.image_folder import read as read_image_folder
from inflora.data.loader import InputFormat, evaluation_batches
from inflora.data.source import Dataset, Options
from inflora.data.stream import make_stream
from inflora.lora import LoRALinear
from inflora.predictions import Prediction, print_predictions
from inflora.runs import train_into
from inflora.serving import load, predict
from inflora.state import DataFacts, StateError, load_state, save_state
from tests.conftest import pair_of, tiny_method
from tests.test_inflora_cli import inflora as command
from tests.test_inflora_cli import refused

PROMPTING = ("l2p", "dualprompt", "codaprompt")


class TrainedRun:
    """A run on disk, and what it says of evaluation images itself."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.results: list[TaskResult] = []
        train_into(folder, config, "test", on_task=self.results.append)
        self.stream = make_stream(config.data, "test")
        self.images = torch.cat([task.eval_rows[:4] for task in self.stream.tasks])
        channels = self.last.model.backbone.patch_embed.proj.in_channels
        input_format = InputFormat(config.data, 32, channels, torch.device("cpu"))
        (self.batch,) = evaluation_batches(self.stream.evaluate, self.images, input_format, 256)
        with torch.no_grad():
            self.logits = self.last.model(self.batch.images)

    @property
    def last(self) -> TaskResult:
        return self.results[-1]

    def files(self, folder: Path) -> list[Path]:
        """The stored images, as files."""
        files = [folder / f"{row}.png" for row in self.images.tolist()]
        for file, row in zip(files, self.images.tolist(), strict=True):
            Image.fromarray(np.squeeze(self.stream.evaluate.pixels.array(row))).save(file)
        return files


@pytest.fixture(scope="module")
def trained(tiny, digits, tmp_path_factory) -> TrainedRun:
    config = override(tiny, {"data.order_seed": 1993, "optim.epochs": 2})
    return TrainedRun(config, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def of_files(tiny, tmp_path_factory) -> TrainedRun:
    """A run on images of other sizes than the model's, in files, shown at another scale."""
    folder = tmp_path_factory.mktemp("files")
    source = samples.image_folder(folder, 4, 6)
    prepare_store("kinds", Dataset(read_image_folder, ""), source, Options(), str(folder))
    data = {"data.dataset": "kinds", "data.root": str(folder), "data.tasks": 2, "data.eval_resize": 40}
    data |= {"data.mean": 0.5, "data.std": 0.2, "backbone.options.in_chans": 3}
    return TrainedRun(override(tiny, data), folder / "run")


@pytest.fixture(scope="module")
def of_domains(tiny, tmp_path_factory) -> TrainedRun:
    folder = tmp_path_factory.mktemp("domains")
    source = samples.domainnet(folder, 3, 6)
    prepare_store("rooms", Dataset(read_domainnet, ""), source, Options(), str(folder), subset=True)
    data = {"data.dataset": "rooms", "data.root": str(folder), "data.scenario": "domain", "data.tasks": 6}
    return TrainedRun(override(tiny, {**data, "backbone.options.in_chans": 3}), folder / "run")


@pytest.mark.parametrize("name", ["trained", "of_files", "of_domains"])
def test_the_loaded_model_gives_the_logits_of_the_runs_own_evaluation(name, request, tmp_path):
    ours: TrainedRun = request.getfixturevalue(name)
    model = inflora.load(ours.folder)
    inputs = torch.stack([model.transform(file) for file in ours.files(tmp_path)])
    assert torch.equal(inputs, ours.batch.images)
    torch.testing.assert_close(model(inputs), ours.logits, atol=1e-5, rtol=1e-5)
    right = ours.stream.class_of[ours.logits.argmax(1)]
    names = [model.class_names[output] for output in ours.logits.argmax(1)]
    classes = [task.classes for task in ours.stream.tasks]
    in_order = list(dict.fromkeys(name for task in classes for name in task))
    assert names == [in_order[label] for label in right.tolist()]
    assert [said.classes[0][0] for said in predict(model, ours.files(tmp_path))] == names


def test_the_model_is_a_plain_timm_model(trained):
    model = inflora.load(trained.folder)
    assert type(model) is VisionTransformer
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert {type(block.attn.qkv) for block in model.blocks} == {nn.Linear}
    assert model.num_classes == 10
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    other = VisionTransformer(num_classes=10, img_size=32, patch_size=8, in_chans=1, embed_dim=32, depth=2, num_heads=2)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval()(trained.batch.images), trained.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_methods_model_can_be_loaded_and_gives_its_own_logits(method, tiny, digits, tmp_path):
    trained = TrainedRun(override(tiny, tiny_method(method) | {"data.tasks": 2, "optim.batch_size": 256}), tmp_path)
    model = inflora.load(tmp_path)
    assert (type(model) is VisionTransformer) == (method not in (*PROMPTING, "ranpac"))
    torch.testing.assert_close(model(trained.batch.images), trained.logits, atol=1e-4, rtol=1e-4)


def test_the_folder_is_enough_after_the_dataset_is_gone(of_files, tmp_path):
    folder, files = tmp_path / "elsewhere", of_files.files(tmp_path)
    shutil.copytree(of_files.folder, folder)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace(of_files.config.data.root, str(tmp_path / "gone")))
    model = inflora.load(folder)
    torch.testing.assert_close(model(of_files.batch.images), of_files.logits, atol=1e-5, rtol=1e-5)
    assert len(list(predict(model, files))) == len(files)


def test_a_run_that_is_not_over_can_be_used(trained, tmp_path):
    first = trained.results[0]
    save_state(first.state, tmp_path / "state")
    shutil.copy(trained.folder / "config.yaml", tmp_path)
    assert inflora.load(tmp_path).class_names == first.classes


# The command.


def test_predict_says_a_line_per_image(trained, tmp_path):
    files = trained.files(tmp_path)[:3]
    said = command("predict", trained.folder, *files, "--top", 2)
    assert said.exit_code == 0, said.output
    best = inflora.load(trained.folder)(trained.batch.images[:3]).softmax(1).topk(2)
    model = inflora.load(trained.folder)
    for line, file, chances, outputs in zip(said.stdout.splitlines(), files, best.values, best.indices, strict=True):
        expected = [f"{model.class_names[i]} {p:.4f}" for i, p in zip(outputs, chances, strict=True)]
        assert line.split("\t") == [str(file), *expected]


def test_nothing_in_a_name_reaches_the_terminal_as_an_order_to_it(capsys):
    said = Prediction(Path("a  b\x1b[31m\n.png"), (("red\x1b[0m", 0.5), ("a  b", 0.25)), doubt="mean pixel")
    assert print_predictions([said], "text", inverted=False)
    printed = capsys.readouterr()
    assert printed.out == "a b\\x1b[31m .png\tred\\x1b[0m 0.5000\ta  b 0.2500\n"
    assert "a b\\x1b[31m .png: mean pixel" in printed.err and len(printed.err.splitlines()) == 1


def test_predict_says_it_in_json_too(trained, tmp_path):
    (file,) = trained.files(tmp_path)[:1]
    said = json.loads(command("predict", trained.folder, file, "--json", "--top", 99).stdout)
    assert said["file"] == str(file)
    assert len(said["classes"]) == 10
    assert sum(each["probability"] for each in said["classes"]) == pytest.approx(1)


def test_what_cannot_be_used_is_refused_in_one_line(trained, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (good,) = trained.files(tmp_path)[:1]
    for arguments in ([tmp_path, good], [trained.folder, tmp_path / "text.png"], [trained.folder, tmp_path / "none"]):
        assert refused(command("predict", *arguments))


def test_a_bad_file_does_not_silence_the_good_ones(trained, tmp_path):
    first, second, *_ = trained.files(tmp_path)
    (tmp_path / "text.png").write_text("no image")
    os.mkfifo(tmp_path / "pipe.png")
    files = [first, tmp_path / "text.png", tmp_path / "pipe.png", tmp_path / "none.png", second]
    done = command("predict", trained.folder, *files, "--json")
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 2
    assert [line["file"] for line in said] == list(map(str, files))
    assert ["classes" in line for line in said] == [True, False, False, False, True]
    assert done.stderr.splitlines() == [f"error: {line['error']}" for line in said[1:4]]


def test_a_folder_is_all_its_images_and_csv_a_table_of_them(trained, tmp_path):
    files = trained.files(tmp_path)[:3]
    (tmp_path / "deeper").mkdir()
    files = [file.replace(tmp_path / "deeper" / f"{9 - place}, so.png") for place, file in enumerate(files)]
    (tmp_path / "deeper" / "notes.txt").write_text("no image")
    for file in set(tmp_path.glob("*.png")):
        file.unlink()
    done = command("predict", trained.folder, tmp_path, "--csv", "--top", 2)
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert done.exit_code == 0
    assert [row["file"] for row in rows] == [str(file) for file in sorted(files) for _ in range(2)]
    assert [row["class"] for row in rows[::2]] == [
        p.classes[0][0] for p in predict(load(trained.folder), sorted(files))
    ]
    assert all(0 <= float(row["probability"]) <= 1 for row in rows)


def test_a_negative_is_warned_of_in_one_line_and_invert_reads_it(trained, tmp_path):
    files = trained.files(tmp_path)[:3]
    negatives = [tmp_path / f"negative-{file.name}" for file in files]
    for file, negative in zip(files, negatives, strict=True):
        ImageOps.invert(Image.open(file)).save(negative)
    plain, warned, read = (
        command("predict", trained.folder, *given) for given in (files, negatives, [*negatives, "--invert"])
    )
    answers = [[line.split("\t")[1] for line in done.stdout.splitlines()] for done in (plain, read)]
    assert answers[0] == answers[1]
    assert plain.stderr == read.stderr == ""
    assert "3 of 3 images look like negatives" in warned.stderr
    assert warned.stderr.strip().endswith("try --invert")
    assert len(warned.stderr.splitlines()) == 1


def test_an_empty_folder_and_two_forms_at_once_are_refused(trained, tmp_path):
    (file,) = trained.files(tmp_path)[:1]
    (tmp_path / "empty").mkdir()
    assert refused(command("predict", trained.folder, tmp_path / "empty"))
    assert refused(command("predict", trained.folder, file, "--json", "--csv"))


def test_an_edited_config_is_refused(trained, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("mean: 0.0", "mean: 0.3"))
    with pytest.raises(StateError, match=r"config\.yaml has .*: edited"):
        load(tmp_path / "run")


def test_a_state_saved_before_brightness_was_noted_is_still_read(trained, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "run")
    state = load_state(tmp_path / "run" / "state")
    facts = {name: getattr(state.data, name) for name in ("classes", "class_of", "channels", "raw")}
    save_state(state._replace(data=DataFacts(**facts)), tmp_path / "run" / "state")
    assert "brightness" not in (tmp_path / "run" / "state" / "state.json").read_text()
    assert [said.doubt for said in predict(load(tmp_path / "run"), trained.files(tmp_path)[:2], invert=True)] == [
        "",
        "",
    ]


def test_other_weights_than_the_run_was_trained_from_are_refused(trained, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "run")
    weights = {name: 2 * tensor for name, tensor in build_backbone(trained.config.backbone).state_dict().items()}
    save_file(weights, tmp_path / "other.safetensors")
    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(
        config.replace("weights: null", f"weights: {tmp_path}/other.safetensors")
    )
    with pytest.raises(StateError, match="trained from other weights"):
        inflora.load(tmp_path / "run")


def test_importing_inflora_is_light():
    script = "import sys, inflora; print([name for name in ('torch', 'timm', 'pyarrow') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Adapters.


@pytest.mark.parametrize("targets", [["k", "v"], ["q", "v", "mlp.fc1"]], ids=str)
def test_the_backbone_with_peft_adapters_of_all_tasks_is_the_merged_model(targets, tiny, digits, tmp_path):
    from peft import PeftModel

    changes = {"adapter.targets": targets, "optim.epochs": 2, "adapter.rank": 12, "adapter.energy": 0.99}
    trained = TrainedRun(override(tiny, changes), tmp_path)
    model, base = inflora.load(tmp_path), build_backbone(load_config(tmp_path / "config.yaml").backbone)
    before = base(trained.batch.images)
    base.reset_classifier(10)
    base.head.load_state_dict(model.head.state_dict())
    tasks = [f"task-{task}" for task in range(1, 6)]
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapters" / "task-1", adapter_name="task-1")
    for task in tasks[1:]:
        adapted.load_adapter(tmp_path / "adapters" / task, adapter_name=task)
    adapted.base_model.set_adapter(tasks)
    torch.testing.assert_close(adapted.eval()(trained.batch.images), trained.logits, atol=1e-4, rtol=1e-4)
    assert (before - trained.last.model.features(trained.batch.images)).abs().max() > 1e-2


def test_what_merges_nothing_leaves_no_adapters(tiny, digits, tmp_path):
    for adapter in ("none", "sdlora"):
        config = override(tiny, pair_of(adapter) | {"data.tasks": 2, "optim.batch_size": 256})
        train_into(tmp_path / adapter, config, "test")
        assert not (tmp_path / adapter / "adapters").exists()
