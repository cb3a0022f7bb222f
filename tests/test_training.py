"""One task's training: the schedule, what is trained and what is not, losses that break, and evaluation."""

import math
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from inflora.adapters import Adapter
from inflora.classifiers import make_classifier
from inflora.config import CLASSIFIERS, DataSettings, LinearSettings, OptimSettings, override
from inflora.continual import run
from inflora.data.loader import InputFormat
from inflora.data.pixels import RawPixels
from inflora.data.store import Images, read_manifest
from inflora.data.stream import Stream, Task
from inflora.lora import adapted_layers
from inflora.metrics import TaskCounts
from inflora.model import ContinualModel
from inflora.task_data import TaskData
from inflora.training import Epoch, batch_loss, evaluate, lr_factor, make_optimizer, train_task, trainable
from tests.conftest import begun, pair_of, task_of_noise


def train(model: ContinualModel, adapter: Adapter[Any], data: TaskData) -> list[Epoch]:
    return train_task(model, adapter, data, lambda _: None)


# The schedule.


def test_adam_runs_its_first_two_epochs_at_the_full_rate_and_falls_nearly_to_nothing():
    factors = [lr_factor(OptimSettings(epochs=10), epoch) for epoch in range(10)]
    assert factors[:2] == [1.0, 1.0]
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert factors[5] == pytest.approx(math.cos(99 * math.pi * 4 / (200 * 9)))
    assert 0 < factors[-1] < 0.3


def test_adam_with_a_single_epoch_runs_at_the_full_rate():
    assert lr_factor(OptimSettings(epochs=1), 0) == 1.0


def test_sgd_follows_half_a_cosine():
    assert [lr_factor(OptimSettings(name="sgd", epochs=4), epoch) for epoch in range(4)] == pytest.approx(
        [1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(3 * math.pi / 4)) / 2]
    )


def test_steps_multiply_the_rate_from_each_milestone_on():
    settings = OptimSettings(epochs=6, schedule="step", milestones=(2, 4), decay=0.1)
    assert [lr_factor(settings, epoch) for epoch in range(6)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_constant_rate_is_constant(name):
    assert {lr_factor(OptimSettings(name=name, schedule="constant", epochs=5), epoch) for epoch in range(5)} == {1.0}


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_every_epoch_runs_at_its_rate_of_the_schedule(name, tiny, monkeypatch):
    rates = []
    optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name]
    step = optimizer.step
    monkeypatch.setattr(
        optimizer, "step", lambda self: (rates.append([g["lr"] for g in self.param_groups]), step(self))
    )
    epochs = train(*begun(tiny, pair_of("lora"), name=name, lr=0.01, head_lr=0.1, epochs=3))
    factors = [lr_factor(OptimSettings(name=name, epochs=3), epoch) for epoch in range(3)]
    expected = [[0.1 * factor, 0.01 * factor] for factor in factors]
    np.testing.assert_allclose(rates, [both for both in expected for _ in "abc"])
    np.testing.assert_allclose([[epoch.head_lr, epoch.lr] for epoch in epochs], expected)


def test_the_classifier_learns_at_its_own_rate_where_one_is_given(tiny):
    model, adapter, _ = begun(tiny, pair_of("inflora"))
    trained = trainable(model, adapter)
    head, adapters = make_optimizer(trained, OptimSettings(lr=0.01, head_lr=0.1)).param_groups
    assert (head["lr"], adapters["lr"]) == (0.1, 0.01)
    assert (head["params"], adapters["params"]) == (trained.classifier, trained.adapter)
    head, adapters = make_optimizer(trained, OptimSettings(lr=0.01)).param_groups
    assert (head["lr"], adapters["lr"]) == (0.01, 0.01)


OWN_RATES = {
    "l2p": {"pool_PLD": "prompt_lr", "keys_PD": "key_lr"},
    "dualprompt": {"general_G2LW": "prompt_lr", "expert_1": "prompt_lr", "key_1": "key_lr"},
    "codaprompt": {"components_1": "prompt_lr", "keys_1": "key_lr", "attentions_1": "key_lr"},
    "sdlora": {"magnitudes": "magnitude_lr"},
}


@pytest.mark.parametrize(("name", "settings"), OWN_RATES.items(), ids=OWN_RATES)
@pytest.mark.parametrize("set_rates", [True, False])
def test_parts_of_an_adapter_learn_at_rates_of_their_own_where_they_are_set(name, settings, set_rates, tiny):
    rates = {"key_lr": 0.3, "prompt_lr": 0.2, "magnitude_lr": 0.4} if set_rates else {}
    pair = pair_of(name)
    pair["adapter"] |= {setting: rates.get(setting) for setting in settings.values()}
    model, adapter, _ = begun(tiny, pair, 2, epochs=1)
    groups = make_optimizer(trainable(model, adapter), OptimSettings(lr=0.01, head_lr=0.1)).param_groups
    found = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    expected = {
        full: 0.1 if full.startswith("classifier.") else rates.get(settings.get(full.split(".")[-1], ""), 0.01)
        for full, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    expected = {full: rate for full, rate in expected.items() if not full.startswith("classifier.heads.0")}
    assert {full: found[id(model.get_parameter(full))] for full in expected} == expected
    assert len(found) == len(expected)


def test_the_schedule_lowers_the_rates_of_all_parts_alike(tiny, monkeypatch):
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self: (rates.append([g["lr"] for g in self.param_groups]), step(self))
    )
    pair = pair_of("dualprompt")
    pair["adapter"] |= {"key_lr": 0.3, "prompt_lr": 0.2}
    epochs = train(*begun(tiny, pair, lr=0.01, head_lr=0.1, epochs=3))
    factors = [lr_factor(OptimSettings(epochs=3), epoch) for epoch in range(3) for _ in range(3)]
    np.testing.assert_allclose(sorted(rates[0]), [0.1, 0.2, 0.3])
    np.testing.assert_allclose(rates, [[factor * rate for rate in rates[0]] for factor in factors])
    assert [(epoch.head_lr, epoch.lr) for epoch in epochs] == [(0.1 * f, 0.01 * f) for f in factors[::3]]


def test_the_optimisers_are_those_of_the_paper(tiny):
    model, adapter, _ = begun(tiny, pair_of("inflora"))
    trained = trainable(model, adapter)
    adam = make_optimizer(trained, OptimSettings(name="adam")).param_groups[0]
    sgd = make_optimizer(trained, OptimSettings(name="sgd", weight_decay=0.1)).param_groups[0]
    assert (adam["betas"], adam["weight_decay"]) == ((0.9, 0.999), 0)
    assert (sgd["momentum"], sgd["weight_decay"]) == (0.9, 0.1)


def test_the_first_task_runs_with_its_own_settings(tiny):
    epochs = []
    config = override(tiny, {"optim.first_task.epochs": 3, "data.tasks": 2, "adapter": "none"})
    list(run(config, on_epoch=lambda done: epochs.append((done.task, done.epoch, done.epochs))))
    assert epochs == [(0, 1, 3), (0, 2, 3), (0, 3, 3), (1, 1, 1)]


# What is trained (that it is what adapter and classifier declare: tests/test_pairs.py).


@pytest.mark.parametrize("name", ["inflora", "lora", "olora"])
def test_after_a_task_the_backbone_is_unchanged_but_for_the_merged_rows_of_keys_and_values(name, tiny):
    model, adapter, data = begun(tiny, pair_of(name))
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items() if "lora" not in name}
    train(model, adapter, data)
    adapter.end_task(model, data)
    after = model.backbone.state_dict()
    assert after.keys() == before.keys()
    merged = {f"{name}.weight" for name, _ in adapted_layers(model.backbone)}
    assert {name for name in after if not torch.equal(after[name], before[name])} == merged
    assert all(torch.equal(after[name][:32], before[name][:32]) for name in merged)


def test_weight_decay_does_not_reach_the_frozen_backbone_or_earlier_classifiers(tiny):
    model, adapter, data = begun(tiny, pair_of("inflora"), 2, name="sgd", weight_decay=0.5, lr=0.1, epochs=1)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not n.endswith("lora_B")}
    train(model, adapter, data)
    assert {n for n in before if not torch.equal(before[n], model.get_parameter(n))} == {
        "classifier.heads.1.weight",
        "classifier.heads.1.bias",
    }


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_the_loss_is_the_cross_entropy_over_the_current_tasks_classes(classifier, tiny):
    model, adapter, data = begun(tiny, pair_of("none", classifier), 2)
    batch = next(data.plain())
    weight, bias = model.classifier.task_parameters()
    scores = (model.features(batch.images) @ weight.T + bias).log_softmax(1)
    expected = -scores[torch.arange(8), torch.arange(8) % 2].mean()
    torch.testing.assert_close(batch_loss(model, adapter, data.task, batch), expected)


@pytest.mark.parametrize("name", ["l2p", "olora"])
def test_what_prompts_and_adapters_penalise_is_added_to_the_loss(name, tiny):
    model, adapter, data = begun(tiny, pair_of(name), 2)
    batch = next(data.plain())
    features, of_prompts = model.encode(batch.images, task=1)
    penalty = sum((*of_prompts, *adapter.penalties(model)))
    assert penalty > 0.01
    expected = model.classifier.loss(features, batch.labels, data.task) + penalty
    torch.testing.assert_close(batch_loss(model, adapter, data.task, batch), expected)


def test_training_lowers_the_loss_and_reports_its_mean_after_each_epoch(tiny):
    reported = []
    epochs = train_task(*begun(tiny, pair_of("lora"), lr=5e-3, epochs=12), reported.append)
    means = [fmean(epoch.losses) for epoch in epochs]
    assert means[-1] < means[0]
    assert [(done.epoch, done.epochs, done.loss) for done in reported] == [(e + 1, 12, x) for e, x in enumerate(means)]
    assert [len(epoch.losses) for epoch in epochs] == [3] * 12


def test_nothing_is_dropped_at_random_while_training(tiny):
    rates = {"drop_rate": 0.5, "attn_drop_rate": 0.5, "drop_path_rate": 0.5, "proj_drop_rate": 0.5}
    config = override(tiny, {"backbone.options": tiny.backbone.options | rates})
    assert next(run(config)).losses == next(run(tiny)).losses


# Losses that break.


class BrokenLater(TaskData):
    """Images that are no numbers from the third epoch on."""

    def augmented(self, purpose):
        for batch in super().augmented(purpose):
            yield batch._replace(images=batch.images * math.nan) if purpose == "train-2" else batch


def test_a_loss_that_is_no_number_stops_the_run_and_says_where(tiny):
    model, adapter, data = begun(tiny, pair_of("lora"), epochs=4)
    with pytest.raises(FloatingPointError, match="the loss of task 0, epoch 2 is nan"):
        train(model, adapter, BrokenLater(*data))


@pytest.mark.parametrize("moment", ["before", "after"])
def test_inputs_that_are_no_numbers_stop_the_run_before_they_are_decomposed(moment, tiny):
    """A solver would stop with an error of its own, or never."""
    model, adapter, data = begun(tiny, pair_of("inflora"))
    with torch.no_grad():
        model.backbone.get_parameter("pos_embed").fill_(math.nan)
    step = adapter.begin_task if moment == "before" else adapter.end_task
    with pytest.raises(FloatingPointError, match=f"inputs of the adapted layers {moment} task 0 are not finite"):
        step(model, data)


# Evaluation.


def counted_one_by_one(model: ContinualModel, images: Images, tasks: list[Task]) -> tuple[TaskCounts, ...]:
    """The counts, one image at a time and in words."""
    counts = []
    owner = [task.index for task in tasks for _ in task.classes]
    for task in tasks:
        correct = aware = right_task = 0
        for row in task.eval_rows.tolist():
            logits = model(images.pixels.tensor[row].permute(2, 0, 1)[None] / 255)[0].tolist()
            best = max(range(len(logits)), key=logits.__getitem__)
            own = max((c for c in range(len(logits)) if owner[c] == task.index), key=logits.__getitem__)
            label = int(images.labels[row])
            correct, aware = correct + (best == label), aware + (own == label)
            right_task += owner[best] == task.index
        counts.append(
            TaskCounts(images=len(task.eval_rows), correct=correct, correct_in_task=aware, right_task=right_task)
        )
    return tuple(counts)


def test_evaluation_counts_what_the_definitions_say(digits):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 6
    pixels = RawPixels(torch.randint(0, 256, (600, 2, 2, 1), generator=generator, dtype=torch.uint8))
    images = Images(pixels, labels, torch.zeros_like(labels))
    classifier = make_classifier(LinearSettings(), 4)
    model = ContinualModel(nn.Sequential(nn.Flatten(), nn.Linear(4, 4).requires_grad_(False)), classifier)
    nn.init.eye_(model.backbone[1].weight)
    nn.init.zeros_(model.backbone[1].bias)
    tasks = []
    for index, size in enumerate((3, 2, 1)):
        first = (0, 3, 5)[index]
        rows = ((labels >= first) & (labels < first + size)).nonzero()[:, 0]
        tasks.append(Task(index, first, tuple("abc"[:size]), rows[:0], rows))
        classifier.begin_task(task_of_noise(index)._replace(task=tasks[-1]))
        for parameter in classifier.task_parameters():
            nn.init.uniform_(parameter, -0.5, 0.5, generator)
    input_format = InputFormat(DataSettings(), side=2, channels=1, device=torch.device("cpu"))
    stream = Stream(tuple(tasks), images, images, torch.arange(6), tuple(range(6)), "", read_manifest(digits))
    counts = evaluate(model, stream, tasks, input_format)
    assert counts == counted_one_by_one(model, images, tasks)
    assert evaluate(model, stream, tasks[:1], input_format)[0].images == 300
    assert len({field for task in counts for field in (task.correct, task.correct_in_task, task.right_task)}) > 5


def test_a_tasks_classifier_begins_as_asked():
    classifier, many = make_classifier(LinearSettings(), 4), tuple(map(str, range(1000)))
    for index, init in enumerate(("zero", "uniform")):
        data = task_of_noise(index, head_init=init)
        classifier.begin_task(data._replace(task=replace(data.task, classes=many)))
    zero, uniform = classifier.heads
    assert not zero.weight.any()
    assert not zero.bias.any()
    assert 0.45 < uniform.weight.abs().max() <= 0.5
    assert uniform.bias.any()
