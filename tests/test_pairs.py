"""What every method must do, whatever it is: each test here runs for all of them."""

import itertools
import multiprocessing
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from inflora.backbone import build_backbone
from inflora.config import ConfigError, OptimSettings, RunConfig, override
from inflora.continual import TaskResult, check, run
from inflora.data.loader import Batch
from inflora.data.stream import Task
from inflora.methods import METHODS, Method, TaskData, make_method
from inflora.metrics import accuracy_matrix
from inflora.model import ContinualModel
from inflora.state import RunState, load_state, save_state
from inflora.training import train_task
from tests.conftest import method_of, same_state, same_tensors

EVERY_METHOD = pytest.mark.parametrize("method", METHODS)
TASKS = 3


def config_of(tiny: RunConfig, method: str, **changes) -> RunConfig:
    return override(tiny, {"method": method_of(method), "optim.batch_size": 40} | changes)


@pytest.fixture(scope="module")
def uninterrupted(tiny) -> dict[str, list[TaskResult]]:
    """Every task of the tiny run, by each method, and by InfLoRA with its classifiers aligned."""
    return {method: list(run(config_of(tiny, method))) for method in (*METHODS, "aligned")}


@EVERY_METHOD
def test_a_run_yields_one_result_per_task_and_final_metrics_with_the_last(method, uninterrupted):
    results = uninterrupted[method]
    assert [result.task for result in results] == list(range(1 if method == "joint" else 5))
    assert ["acc/final" in result.metrics for result in results] == [r.state.is_complete for r in results]
    assert results[-1].state.is_complete
    assert accuracy_matrix(results[-1].state.evaluations) == [result.accuracies for result in results]
    assert [name for result in results for name in result.classes] == [str(digit) for digit in range(10)]


@EVERY_METHOD
def test_the_first_task_is_learnt_well_above_chance(method, tiny):
    changes = {"optim.epochs": 4, "optim.lr": 1e-2, "optim.batch_size": 16, "data.augment": "none"}
    result = next(run(config_of(tiny, method, **changes)))
    chance = 1 / len(result.classes)
    assert result.metrics["acc/new"] > chance + 0.5 * (1 - chance)


@EVERY_METHOD
def test_the_same_seed_gives_the_same_run_and_another_seed_another(method, tiny, uninterrupted):
    again, other = (next(run(config_of(tiny, method, seed=seed))).state for seed in (0, 1))
    assert same_state(uninterrupted[method][0].state, again)
    if method != "ncm":  # where nothing is drawn
        assert not same_tensors(again.model, other.model)


@pytest.mark.parametrize("method", [*METHODS, "aligned"])
@pytest.mark.parametrize("done", [1, 3])
def test_a_run_killed_after_any_task_and_resumed_equals_the_uninterrupted_one_bit_for_bit(
    method, done, tiny, uninterrupted, tmp_path
):
    whole = uninterrupted[method]
    save_state(whole[min(done, len(whole)) - 1].state, tmp_path)
    resumed = list(run(config_of(tiny, method), load_state(tmp_path)))
    assert [r.task for r in resumed] == list(range(done, len(whole)))
    for ours, theirs in zip(resumed, whole[done:], strict=True):
        assert same_state(ours.state, theirs.state)
        assert (ours.metrics, ours.step_losses, ours.accuracies) == (
            theirs.metrics,
            theirs.step_losses,
            theirs.accuracies,
        )


# What is trained, on batches made up for the purpose.

IMAGES = torch.rand(24, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def begun(tiny: RunConfig, method: str, tasks: int) -> tuple[ContinualModel, Method, Task]:
    """A model that has learnt all of ``tasks`` tasks but the last, which has begun."""
    learner, model = make_method(config_of(tiny, method).method), ContinualModel(build_backbone(tiny.backbone), 32)
    learner.prepare(model)
    for index in range(tasks):
        task = Task(index, 2 * index, ("a", "b"), torch.arange(24), torch.arange(0))
        model.add_head(2, "uniform", torch.Generator().manual_seed(index))
        learner.begin_task(model, data_of(task))
        if index + 1 < tasks:
            train(model, learner, task)
            learner.end_task(model, data_of(task))
    return model, learner, task


def passes_of(task: Task):
    def passes(purpose: str = ""):
        for rows in torch.arange(24).split(8):
            yield Batch(IMAGES[rows], task.first_label + rows % 2, 1.0)

    return passes


def data_of(task: Task) -> TaskData:
    return TaskData(task, 3, 0, passes_of(task), passes_of(task))


def train(model: ContinualModel, learner: Method, task: Task) -> None:
    train_task(model, learner, task, OptimSettings(lr=0.01, epochs=2), passes_of(task), lambda _: None)


def tensors_of(model: ContinualModel) -> dict[str, Tensor]:
    everything = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in everything}


@EVERY_METHOD
@pytest.mark.parametrize("tasks", [1, 2])
def test_training_changes_as_many_parameters_as_the_method_declares_and_no_other(method, tasks, tiny):
    model, learner, task = begun(tiny, method, tasks)
    declared, before = learner.trainable(model), tensors_of(model)
    train(model, learner, task)
    changed = {name: tensor for name, tensor in tensors_of(model).items() if not torch.equal(tensor, before[name])}
    assert sum(tensor.numel() for tensor in changed.values()) == declared.size
    identities = {id(parameter) for parameter in (*declared.classifier, *declared.adapted)}
    assert {id(model.get_parameter(name)) for name in changed} == identities


@EVERY_METHOD
def test_the_declared_number_is_reported_as_a_metric(method, uninterrupted):
    counts = [result.metrics["params/trainable"] for result in uninterrupted[method]]
    assert all(count > 0 for count in counts) or method == "ncm"


@EVERY_METHOD
def test_only_what_is_declared_is_given_gradients(method, tiny):
    model, learner, task = begun(tiny, method, 2)
    declared = learner.trainable(model)
    model.zero_grad()
    if declared.size:
        learner.loss(model, next(passes_of(task)()), task).backward()
    given = {id(parameter) for parameter in model.parameters() if parameter.grad is not None}
    assert given <= {id(parameter) for parameter in (*declared.classifier, *declared.adapted)}


@EVERY_METHOD
def test_the_end_of_a_task_leaves_no_adapter_and_no_hook(method, tiny):
    model, learner, task = begun(tiny, method, 1)
    train(model, learner, task)
    learner.end_task(model, data_of(task))
    assert not [name for name, _ in model.named_parameters() if "lora_" in name]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@EVERY_METHOD
def test_a_task_with_one_class_and_a_last_batch_of_one_image_are_learnt(method, tiny):
    changes = {"data.tasks": 10, "optim.batch_size": 160}
    results = list(itertools.islice(run(config_of(tiny, method, **changes)), 2))
    assert results[0].metrics["acc/new"] == (1.0 if method != "joint" else results[0].metrics["acc/new"])
    assert all(torch.isfinite(tensor).all() for tensor in results[-1].state.model.values())


@EVERY_METHOD
def test_tasks_of_unequal_size_are_learnt(method, tiny):
    results = list(run(config_of(tiny, method, **{"data.tasks": [5, 1, 4]})))
    assert [len(result.classes) for result in results] == ([10] if method == "joint" else [5, 1, 4])
    heads = [len(tensor) for name, tensor in results[-1].state.model.items() if re.fullmatch(r"heads.\d+.bias", name)]
    assert heads == [len(result.classes) for result in results]


# Several workers.


def work(rank: int, folder: Path, tiny: RunConfig) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    for method in METHODS:
        *_, last = itertools.islice(run(config_of(tiny, method)), TASKS)
        save_state(last.state, folder / f"{method}-{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_workers(tiny, digits, tmp_path_factory) -> Path:
    """A folder with the state after some tasks, by each method and worker."""
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
@EVERY_METHOD
def test_two_workers_learn_what_one_learns(method, two_workers, uninterrupted):
    states: list[RunState] = [load_state(two_workers / f"{method}-{rank}") for rank in range(2)]
    assert same_state(*states)
    whole = uninterrupted[method][min(TASKS, len(uninterrupted[method])) - 1].state
    assert states[0].evaluations == whole.evaluations
    weights = [{n: t for n, t in s.model.items() if n.endswith((".weight", ".bias"))} for s in (states[0], whole)]
    torch.testing.assert_close(*weights, atol=1e-3, rtol=0)
    torch.testing.assert_close(states[0].probes, whole.probes, atol=1e-3, rtol=0)


# Settings.

NONSENSE = {
    "inflora": [{"rank": 0}, {"rank": 33}, {"blocks": 3}, {"targets": []}, {"targets": ["k", "k"]}, {"targets": ["x"]}],
    "sequential": [{"rank": 33}, {"blocks": 0}, {"targets": ["w"]}],
    "joint": [{"rank": 33}, {"blocks": 3}],
    "olora": [{"penalty": -1}, {"rank": 33}, {"blocks": 3}],
    "sdlora": [{"rank": 33}, {"blocks": 3}, {"targets": ["k", "k"]}],
    "frozen": [{"rank": 1}],
    "ncm": [{"rank": 1}],
    "l2p": [{"top": 5}, {"pool": 0}, {"length": 0}, {"pull": -1}],
    "dualprompt": [{"general_blocks": 2}, {"expert_blocks": 0}, {"pull": -1}],
    "codaprompt": [{"blocks": 3}, {"length": 3}, {"components": 0}, {"orthogonality": -0.1}],
}


@pytest.mark.parametrize(
    ("method", "nonsense"), [(method, changes) for method, all_changes in NONSENSE.items() for changes in all_changes]
)
def test_nonsense_is_refused_in_one_line_that_names_the_setting(method, nonsense, tiny):
    with pytest.raises(ConfigError) as error:
        check(override(tiny, {"method": method_of(method) | nonsense}))
    assert len(str(error.value).splitlines()) == 1
    assert all(name in str(error.value) for name in nonsense)


def test_every_methods_settings_have_been_tried():
    assert NONSENSE.keys() == METHODS.keys()
