"""What every adapter must do with every classifier, whatever they are: each test here runs for all pairs."""

import functools
import itertools
import multiprocessing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import inflora
from inflora.adapters import Adapter, make_adapter
from inflora.adapters.first_tasks import FirstTasks
from inflora.adapters.inflora import InfLoRA
from inflora.adapters.lora import LoRA
from inflora.adapters.olora import OLoRA
from inflora.adapters.prompts.codaprompt import CODAPrompt
from inflora.adapters.prompts.dualprompt import DualPrompt
from inflora.adapters.prompts.l2p import L2P
from inflora.adapters.sdlora import SDLoRA
from inflora.backbone import build_backbone
from inflora.classifiers import Classifier, make_classifier
from inflora.classifiers.aligned import Aligned
from inflora.classifiers.lda import LDA
from inflora.classifiers.linear import Linear
from inflora.classifiers.ncm import NCM
from inflora.classifiers.ranpac import RanPAC
from inflora.config import (
    ADAPTERS,
    CLASSIFIERS,
    METHODS,
    AdaptedSettings,
    ConfigError,
    RunConfig,
    dump_config,
    override,
    settings_of_method,
)
from inflora.config.listing import all_settings
from inflora.continual import TaskResult, run
from inflora.data.stream import make_stream
from inflora.features import features_of
from inflora.lora import LoRALinear
from inflora.metrics import accuracy_matrix
from inflora.model import ContinualModel
from inflora.setup import check
from inflora.state import RunState, load_state, save_state
from inflora.training import batch_loss, train_task, trainable
from tests.conftest import SMALL, begun, pair_of, same_state, same_tensors


class Pair(NamedTuple):
    """An adapter and a classifier, by name; ``joint`` learns all tasks as one, ``options`` are the adapter's own."""

    adapter: str
    classifier: str
    joint: bool = False
    options: str = ""

    def __str__(self) -> str:
        return f"{'joint+' if self.joint else ''}{self.adapter}+{self.classifier}{self.options and ','}{self.options}"

    @property
    def settings(self) -> dict[str, Any]:
        return pair_of(self.adapter, self.classifier) | {"data.joint": self.joint} | OPTIONS[self.options]

    @property
    def has_fitted_classifier(self) -> bool:
        return classifier_of(self.classifier).is_fitted

    def trains(self, task: int) -> bool:
        """True where there is something to train in a task."""
        adapts = self.adapter in TRAINED and not (task and self.options == "first task only")
        return adapts or classifier_of(self.classifier).trained_alone

    @property
    def trains_nothing(self) -> bool:
        return not self.trains(0)


OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "first task only": {"adapter.adapt_tasks": 1},
    "both features": {"adapter.features": "both"},
    "two views": {"classifier.views": 2},
    "balanced": {"adapter.balance": 1.0},
}
TRAINED = [name for name, settings in ADAPTERS.items() if issubclass(settings, AdaptedSettings)]


@functools.cache
def classifier_of(name: str) -> Classifier[Any]:
    """A classifier as it begins."""
    return make_classifier(CLASSIFIERS[name](**SMALL.get(name, {})), width=1)


def every(pairs: list[Pair]) -> pytest.MarkDecorator:
    """All of them; the unit suite has the few that show every adapter and every classifier."""
    longer = [() if pair in FEW or pair not in PAIRS else pytest.mark.cluster for pair in pairs]
    cases = zip(pairs, longer, strict=True)
    return pytest.mark.parametrize("pair", [pytest.param(pair, marks=marks, id=str(pair)) for pair, marks in cases])


PAIRS = [Pair(*names) for names in itertools.product(ADAPTERS, CLASSIFIERS)]
JOINT = [Pair("lora", "linear", joint=True), Pair("none", "linear", joint=True)]
FIRST_ONLY = [Pair(name, kind, options="first task only") for name in TRAINED for kind in ("linear", "lda")]
BOTH = [Pair(name, "linear", options="both features") for name in TRAINED] + [
    Pair("lora", "qda", False, "both features")
]
VIEWS = [Pair("lora", "ranpac", False, "two views"), Pair("inflora", "aligned", False, "two views")]
BALANCED = [Pair("inflora", "lda", False, "balanced")]
FEW = [pair for pair in PAIRS if pair.classifier == "linear" or pair.adapter in ("inflora", "none")]
"""Every adapter and every classifier, for what takes long."""
PROMPTING = ("l2p", "dualprompt", "codaprompt")

CLASSES = [3, 1, 4, 2]
STREAM = {"data.tasks": CLASSES, "optim.batch_size": 61}
"""Tasks of unequal size; the second has one class, and a last batch of one image."""


def config_of(tiny: RunConfig, pair: Pair, **changes: Any) -> RunConfig:
    return override(tiny, pair.settings | STREAM | changes)


@pytest.fixture(scope="module")
def uninterrupted(tiny) -> Callable[[Pair], list[TaskResult]]:
    """Every task of a pair's tiny run."""
    known: dict[Pair, list[TaskResult]] = {}

    def results(pair: Pair) -> list[TaskResult]:
        if pair not in known:
            known[pair] = list(run(config_of(tiny, pair)))
        return known[pair]

    return results


def test_the_pairs_tried_are_all_that_a_config_takes():
    choices = {setting.path: setting.allowed.split(", ") for setting in all_settings() if not setting.choice}
    names = (choices[group] for group in ("adapter.name", "classifier.name"))
    assert sorted(itertools.product(*names)) == sorted(pair[:2] for pair in PAIRS)


def test_the_stream_tried_has_a_task_of_one_class_and_a_batch_of_one_image(tiny, digits):
    tasks = make_stream(override(tiny, STREAM).data, "validation").tasks
    assert [len(task.classes) for task in tasks] == CLASSES
    assert len(tasks[CLASSES.index(1)].train_rows) % STREAM["optim.batch_size"] == 1


@every(PAIRS + JOINT + FIRST_ONLY + BOTH + VIEWS + BALANCED)
def test_a_run_yields_one_result_per_task_and_final_metrics_with_the_last(pair, uninterrupted):
    results, classes = uninterrupted(pair), [10] if pair.joint else CLASSES
    assert [result.task for result in results] == list(range(len(classes)))
    assert ["acc/final" in result.metrics for result in results] == [r.state.is_complete for r in results]
    assert results[-1].state.is_complete
    assert accuracy_matrix(results[-1].state.evaluations) == [result.accuracies for result in results]
    assert [len(result.classes) for result in results] == classes
    assert [name for result in results for name in result.classes] == [str(digit) for digit in range(10)]
    assert results[-1].model.classifier.classes == sum(classes)
    assert all(t.isfinite().all() for tensors in results[-1].state.tensors.values() for t in tensors.values())


@every([pair for pair in FEW if pair.classifier != "aligned"] + JOINT[:1])
def test_the_first_task_is_learnt_well_above_chance(pair, tiny):
    changes = {"data.tasks": 5, "optim.epochs": 4, "optim.lr": 1e-2, "optim.batch_size": 16, "data.augment": "none"}
    result = next(run(config_of(tiny, pair, **changes)))
    chance = 1 / len(result.classes)
    assert result.metrics["acc/new"] > chance + 0.5 * (1 - chance)


@every([pair for pair in FEW if pair.classifier != "linear"])
def test_what_an_adapter_learns_is_the_same_with_every_classifier(pair, uninterrupted):
    """All of them lead it with the same head."""
    ours, linear = uninterrupted(pair), uninterrupted(Pair(pair.adapter, "linear"))
    assert all(same_tensors(a.state.model, b.state.model) for a, b in zip(ours, linear, strict=True))
    assert [result.losses for result in ours] == [result.losses if pair.trains(0) else [] for result in linear]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_alignment_changes_nothing_before_the_second_task(adapter, uninterrupted):
    aligned, linear = (uninterrupted(Pair(adapter, classifier)) for classifier in ("aligned", "linear"))
    heads = [
        [{name: t for name, t in result.state.classifier.items() if "heads" in name} for result in results]
        for results in (aligned, linear)
    ]
    assert [same_tensors(*pair) for pair in zip(*heads, strict=True)] == [True, False, False, False]
    assert aligned[0].state.evaluations == linear[0].state.evaluations


@every(FEW + JOINT)
def test_the_same_seed_gives_the_same_run_and_another_seed_another(pair, tiny, uninterrupted):
    again, other = (next(run(config_of(tiny, pair, seed=seed))).state for seed in (0, 1))
    assert same_state(uninterrupted(pair)[0].state, again)
    learnt = [state.model | state.classifier for state in (again, other)]
    assert same_tensors(*learnt) == (pair.trains_nothing and pair.classifier != "ranpac")  # where nothing is drawn


def resumed_equals(whole: list[TaskResult], config: RunConfig, done: int, folder: Path) -> None:
    save_state(whole[done - 1].state, folder)
    resumed = list(run(config, load_state(folder)))
    assert [r.task for r in resumed] == list(range(done, len(whole)))
    for ours, theirs in zip(resumed, whole[done:], strict=True):
        assert same_state(ours.state, theirs.state)
        assert (ours.metrics, ours.epochs, ours.accuracies, ours.task_aware) == (
            theirs.metrics,
            theirs.epochs,
            theirs.accuracies,
            theirs.task_aware,
        )


@every(PAIRS + FIRST_ONLY[::2] + BOTH + VIEWS + BALANCED)
def test_a_run_killed_before_its_last_task_and_resumed_equals_the_uninterrupted_one_bit_for_bit(
    pair, tiny, uninterrupted, tmp_path
):
    resumed_equals(uninterrupted(pair), config_of(tiny, pair), 3, tmp_path)


@every(PAIRS + JOINT + FIRST_ONLY[1::2])
def test_a_run_killed_after_its_first_task_and_resumed_equals_the_uninterrupted_one_bit_for_bit(
    pair, tiny, uninterrupted, tmp_path
):
    resumed_equals(uninterrupted(pair), config_of(tiny, pair), 1, tmp_path)


@every(FEW + JOINT + FIRST_ONLY[::2] + BOTH + BALANCED)
def test_a_runs_folder_is_a_model_that_gives_the_runs_own_logits_and_plain_timm_where_that_can_be(
    pair, tiny, uninterrupted, tmp_path
):
    last = uninterrupted(pair)[-1]
    (tmp_path / "config.yaml").write_text(dump_config(config_of(tiny, pair)))
    save_state(last.state, tmp_path / "state")
    model, images = inflora.load(tmp_path), torch.rand(16, 1, 32, 32)
    as_timm = (
        pair.adapter not in PROMPTING and pair.classifier not in ("qda", "ranpac") and pair.options != "both features"
    )
    assert type(model) is (VisionTransformer if as_timm else ContinualModel)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    with torch.no_grad():
        logits = last.model(images)
    torch.testing.assert_close(model(images), logits, atol=1e-4 * max(1.0, float(logits.abs().max())), rtol=1e-4)
    assert (logits.std(dim=0) > 1e-3).all()  # the images tell models apart


# What is trained, on tasks of noise.


def tensors_of(model: ContinualModel) -> dict[str, Tensor]:
    everything = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in everything}


def changed_since(before: dict[str, Tensor], model: ContinualModel) -> set[str]:
    now = tensors_of(model)
    assert now.keys() == before.keys()
    return {name for name, tensor in now.items() if not torch.equal(tensor, before[name])}


@every(FEW + FIRST_ONLY + BOTH + BALANCED)
@pytest.mark.parametrize("tasks", [1, 2])
def test_training_changes_what_is_declared_and_nothing_else(pair, tasks, tiny):
    model, adapter, data = begun(tiny, pair.settings, tasks)
    declared, before = trainable(model, adapter), tensors_of(model)
    train_task(model, adapter, data, lambda _: None)
    changed = changed_since(before, model)
    parameters = {id(parameter) for parameter in (*declared.classifier, *declared.adapter)}
    assert {id(model.get_parameter(name)) for name in changed} == parameters
    assert sum(before[name].numel() for name in changed) == declared.size


@every(FEW + JOINT + FIRST_ONLY + BOTH)
def test_the_declared_number_is_reported_as_a_metric_and_trained_where_there_is_any(pair, uninterrupted):
    results = uninterrupted(pair)
    trains = [pair.trains(task) for task in range(len(results))]
    assert [result.metrics["params/trainable"] > 0 for result in results] == trains
    assert [bool(result.epochs) for result in results] == trains


@every([pair for pair in FEW + FIRST_ONLY + BOTH if pair.trains(1)])
def test_what_is_declared_is_given_gradients_and_nothing_else(pair, tiny):
    model, adapter, data = begun(tiny, pair.settings, 2)
    declared = trainable(model, adapter)
    model.zero_grad()
    batch_loss(model, adapter, data.task, next(data.augmented("train-0"))).backward()
    given = {id(parameter) for parameter in model.parameters() if parameter.grad is not None}
    assert given == {id(parameter) for parameter in (*declared.classifier, *declared.adapter)}


@every(FEW + FIRST_ONLY + BOTH + BALANCED)
def test_the_end_of_a_task_leaves_no_adapter_and_no_hook_and_then_the_classifier_alone_is_fitted(pair, tiny):
    model, adapter, data = begun(tiny, pair.settings, 2)
    train_task(model, adapter, data, lambda _: None)
    adapter.end_task(model, data)
    before = tensors_of(model)
    model.classifier.fit(features_of(model, data), None, data)
    now = tensors_of(model)
    kept, learnt = ({n: t for n, t in before.items() if n.startswith("classifier.") == of} for of in (False, True))
    assert same_tensors(kept, {n: t for n, t in now.items() if not n.startswith("classifier.")})
    assert same_tensors(learnt, {n: t for n, t in now.items() if n.startswith("classifier.")}) == (
        not pair.has_fitted_classifier
    )
    assert model.classifier.classes == 4
    assert not [name for name, _ in model.named_parameters() if "lora_" in name]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# Adapting during the first tasks only.


@every(FIRST_ONLY)
def test_after_the_first_task_no_feature_changes_any_more(pair, uninterrupted):
    first, *later = uninterrupted(pair)
    drifts = [value for result in later for name, value in result.metrics.items() if name.startswith("drift/")]
    assert len(drifts) == 2 + 3 + 4 and not any(drifts)
    assert all(same_tensors(result.state.model, first.state.model) for result in later)
    assert all(same_tensors(result.state.adapter, first.state.adapter) for result in later)
    assert not any(result.factors for result in later)


@pytest.mark.parametrize("adapter", TRAINED)
def test_what_is_learnt_in_the_first_task_is_what_would_be_learnt_in_it_anyway_and_then_features_would_move(
    adapter, uninterrupted
):
    only, always = (
        uninterrupted(Pair(adapter, "linear", options="first task only")),
        uninterrupted(Pair(adapter, "linear")),
    )
    assert same_tensors(
        only[0].state.model | only[0].state.classifier, always[0].state.model | always[0].state.classifier
    )
    assert all(result.metrics["drift/mean"] > 0 for result in always[2:])  # the second has one class, and no loss


@pytest.mark.parametrize("adapter", TRAINED)
def test_heads_go_on_learning_where_features_do_not(adapter, tiny):
    model, learner, data = begun(tiny, Pair(adapter, "linear", options="first task only").settings, 2, epochs=6)
    declared = trainable(model, learner)
    assert not declared.adapter and {id(p) for p in declared.classifier} == {
        id(p) for p in model.classifier.heads[1].parameters()
    }
    epochs = train_task(model, learner, data, lambda _: None)
    assert sum(epochs[-1].losses) < sum(epochs[0].losses)


# The frozen model's features beside the adapted's.


@every(BOTH)
def test_the_second_half_of_both_features_are_the_frozen_backbones_before_and_after_learning(pair, tiny):
    images = torch.rand(8, 1, 32, 32)
    model, adapter, data = begun(tiny, pair.settings)
    frozen, before = build_backbone(tiny.backbone)(images), model.features(images)
    assert model.width == before.shape[1] == 2 * frozen.shape[1]
    train_task(model, adapter, data, lambda _: None)
    adapter.end_task(model, data)
    adapted, beside = model.features(images).chunk(2, dim=1)
    assert torch.equal(before[:, frozen.shape[1] :], frozen) and torch.equal(beside, frozen)
    assert (adapted - before[:, : frozen.shape[1]]).abs().max() > 1e-4


@every(BOTH)
def test_a_run_with_both_features_ends_with_the_frozen_backbones_in_the_second_half(pair, uninterrupted):
    images = torch.rand(8, 1, 32, 32)
    both, none = (uninterrupted(of)[-1] for of in (pair, Pair("none", "linear")))
    with torch.no_grad():
        adapted, beside = both.model.features(images).chunk(2, dim=1)
        # The last block may be cut short for one and not for the other: the same numbers but for their rounding.
        torch.testing.assert_close(beside, none.model.features(images), atol=1e-5, rtol=1e-5)
    assert not torch.equal(adapted, beside)
    assert not [name for name in both.state.model if "frozen" in name]


# Several workers.

TRIED = [
    *FEW,
    *VIEWS,
    *BALANCED,
    JOINT[0],
    Pair("lora", "lda", options="first task only"),
    Pair("lora", "qda", options="both features"),
]
TASKS = 3


def work(rank: int, folder: Path, tiny: RunConfig) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    for pair in TRIED:
        *_, last = itertools.islice(run(config_of(tiny, pair)), TASKS)
        save_state(last.state, folder / f"{pair}-{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_workers(tiny, digits, tmp_path_factory) -> Path:
    """A folder with the state after some tasks, by each pair and worker."""
    folder = tmp_path_factory.mktemp("workers")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["inflora.continual"])
    processes = [context.Process(target=work, args=(rank, folder, tiny)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    return folder


@pytest.mark.cluster
@every(TRIED)
def test_two_workers_learn_what_one_learns(pair, two_workers, uninterrupted):
    states: list[RunState] = [load_state(two_workers / f"{pair}-{rank}") for rank in range(2)]
    assert same_state(*states)
    if pair.adapter == "e2lora":
        return  # it writes along directions that nothing has told apart: any basis of them would do
    whole = uninterrupted(pair)[:TASKS][-1].state
    # An image's answer may turn on the last digit where directions hardly vary that a fitted classifier divides by.
    off_by = 1 if pair.has_fitted_classifier else 0
    ours, theirs = (
        [list(counts.model_dump().values()) for evaluation in state.evaluations for counts in evaluation]
        for state in (states[0], whole)
    )
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=off_by, rtol=0)
    for group in ("model", "classifier"):
        here, there = (state.tensors[group] for state in (states[0], whole))
        assert here.keys() == there.keys()
        for name, tensor in there.items():
            size = max(1.0, float(tensor.abs().max()))
            torch.testing.assert_close(here[name], tensor, atol=1e-3 * size, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(states[0].probes, whole.probes, atol=1e-3, rtol=0)


# Published methods.

PUBLISHED = {
    "inflora": (InfLoRA, Linear, False),
    "inflora-ca": (InfLoRA, Aligned, False),
    "sequential": (LoRA, Linear, False),
    "frozen": (Adapter, Linear, False),
    "ncm": (Adapter, NCM, False),
    "slda": (Adapter, LDA, False),
    "ranpac": (FirstTasks, RanPAC, False),
    "joint": (LoRA, Linear, True),
    "olora": (OLoRA, Linear, False),
    "sdlora": (SDLoRA, Linear, False),
    "l2p": (L2P, Linear, False),
    "dualprompt": (DualPrompt, Linear, False),
    "codaprompt": (CODAPrompt, Linear, False),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_published_name_makes_the_pair_that_it_stands_for(name, tiny):
    config = override(tiny, settings_of_method(name))
    pair = make_adapter(config.adapter), make_classifier(config.classifier, 32)
    assert (type(pair[0]), type(pair[1]), config.data.joint) == PUBLISHED[name]


# What is refused.

NEEDS_TASKS = "config: classifier aligned needs several tasks: with one there is nothing to align"
DRAWS = {"replay.draws": "draws.safetensors"}
REFUSED = {
    **{str(pair): (pair.settings, NEEDS_TASKS) for pair in (Pair(name, "aligned", joint=True) for name in ADAPTERS)},
    "views of images that are not augmented": (
        VIEWS[0].settings | {"data.augment": "none"},
        "config: classifier.views are augmented, got 2 with data.augment none",
    ),
    **{
        f"{name} with recorded draws": (
            pair_of("inflora", name) | DRAWS,
            f"config: replay.draws are for classifier aligned, got classifier {name}",
        )
        for name in CLASSIFIERS
        if name != "aligned"
    },
    **{
        f"{name}, compiled": (
            pair_of(name) | {"compile": True},
            f"compile must be false with adapter {name}: prompts change the model's code",
        )
        for name in PROMPTING
    },
    "a classifier for an adapter": (
        {"adapter": "ncm"},
        f"unknown adapter.name 'ncm'; known: {', '.join(ADAPTERS)}",
    ),
    "an adapter for a classifier": (
        {"classifier": "lora"},
        f"unknown classifier.name 'lora'; known: {', '.join(CLASSIFIERS)}",
    ),
}


def refusal(tiny: RunConfig, changes: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        check(override(tiny, changes))
    return str(error.value)


@pytest.mark.parametrize(("changes", "line"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_pair_is_refused_in_one_line(changes, line, tiny):
    assert refusal(tiny, changes) == line


@every([Pair(*names, joint=True) for names in itertools.product(ADAPTERS, CLASSIFIERS) if "aligned" not in names])
def test_every_other_pair_may_learn_all_tasks_as_one(pair, tiny, digits):
    check(config_of(tiny, pair))


NONSENSE: dict[str, list[dict[str, Any]]] = {
    "adapter.none": [{"rank": 1}, {"adapt_tasks": 1}, {"features": "both"}],
    "adapter.lora": [
        {"rank": 33},
        {"rank": "auto"},
        {"blocks": 0},
        {"blocks": 3},
        {"targets": ["w"]},
        {"targets": "k,w"},
        {"adapt_tasks": 0},
        {"features": "frozen"},
        {"merge": 0},
        {"merge": 1.1},
    ],
    "adapter.inflora": [
        {"rank": 0},
        {"rank": 33},
        {"blocks": 3},
        {"targets": []},
        {"targets": ["k", "k"]},
        {"targets": ["x"]},
    ],
    "adapter.olora": [{"penalty": -1}, {"rank": 33}, {"blocks": 3}],
    "adapter.sdlora": [{"rank": 33}, {"blocks": 3}, {"targets": ["k", "k"]}, {"magnitude_lr": 0}],
    "adapter.e2lora": [{"rank": 8}, {"blocks": 3}, {"targets": ["x"]}],
    "adapter.l2p": [{"merge": 0.5}, {"top": 5}, {"pool": 0}, {"length": 0}, {"pull": -1}, {"key_lr": 0}],
    "adapter.dualprompt": [{"general_blocks": 2}, {"expert_blocks": 0}, {"pull": -1}, {"prompt_lr": 0}],
    "adapter.codaprompt": [{"blocks": 3}, {"length": 3}, {"components": 0}, {"orthogonality": -0.1}],
    "classifier.linear": [{"epochs": 1}],
    "classifier.aligned": [
        {"epochs": 0},
        {"steps": 0},
        {"lr": 0},
        {"samples": 0},
        {"temperature": 0},
        {"weight_decay": -1},
        {"drift": -1},
    ],
    "classifier.ncm": [{"epochs": 1}, {"drift": -1}, {"views": -1}, {"views": 101}],
    "classifier.lda": [{"shrinkage": 1.5}, {"shrinkage": -0.1}, {"pooling": 0.5}, {"drift": -1}],
    "classifier.qda": [{"shrinkage": 1.5}, {"pooling": -0.1}, {"pooling": 1.1}, {"pooling": None}, {"drift": -1}],
    "classifier.ranpac": [{"features": 0}, {"features": 10.5}, {"drift": -1}, {"shrinkage": 0.1}],
}


@pytest.mark.parametrize(
    ("choice", "nonsense"), [(choice, changes) for choice, all_changes in NONSENSE.items() for changes in all_changes]
)
def test_nonsense_is_refused_in_one_line_that_names_the_setting(choice, nonsense, tiny):
    group, _, name = choice.partition(".")
    line = refusal(tiny, {group: pair_of(name, name)[group] | nonsense})
    assert len(line.splitlines()) == 1
    assert all(f"{group}.{setting}" in line or f"{group}: {setting}" in line for setting in nonsense)


def test_every_adapters_and_classifiers_settings_have_been_tried():
    assert NONSENSE.keys() == {f"adapter.{name}" for name in ADAPTERS} | {f"classifier.{name}" for name in CLASSIFIERS}
