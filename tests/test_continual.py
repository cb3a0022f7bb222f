"""Whole runs: no interference, resuming, and what a trial cannot reach."""

import itertools
import json
import re
import shutil
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from inflora import continual
from inflora.backbone import build_backbone
from inflora.config import ConfigError, RunConfig, config_hash, override
from inflora.continual import TaskResult, run
from inflora.data.loader import InputFormat, evaluation_batches
from inflora.data.store import DataError
from inflora.data.stream import Task, make_stream
from inflora.drift import Probes
from inflora.model import ContinualModel
from inflora.runs import train_into
from inflora.setup import check, identity
from inflora.state import RunState, StateError, load_state, save_state
from inflora.subspace import Memory, free_basis
from tests.conftest import pair_of, same_state, same_tensors, tiny_method


def of_method(tiny: RunConfig, name: str, **changes) -> RunConfig:
    return override(tiny, tiny_method(name) | changes)


@pytest.fixture(scope="module")
def results(tiny) -> list[TaskResult]:
    """Every task of the tiny run."""
    return list(run(tiny))


# The stream of results.


def test_a_run_depends_neither_on_randomness_used_elsewhere_nor_on_the_tasks_still_to_come(tiny, results):
    torch.manual_seed(123)
    torch.rand(7)
    assert same_state(next(run(tiny)).state, results[0].state)


def test_learning_every_task_at_once_is_one_task_with_all_classes(tiny):
    (result,) = run(of_method(tiny, "joint"))
    assert len(result.classes) == 10
    assert result.metrics["acc/final"] == result.metrics["acc/seen"]
    assert result.metrics["forgetting"] == 0


# No interference.


def keys_and_values(state: RunState, layer: str, inputs_ND: Tensor) -> Tensor:
    """What the layer's merged weight makes of some inputs; the bias never changes."""
    return inputs_ND @ state.model[f"{layer}.weight"][32:].double().T


def memories(state: RunState) -> dict[str, Memory]:
    return {key.rpartition(".")[0]: Memory(key.rpartition(".")[2], basis) for key, basis in state.adapter.items()}


NO_INTERFERENCE = {
    "gpm": {"adapter.memory": "gpm", "adapter.energy": 0.99},
    "dualgpm, few taken": {"adapter.energy": 0.99},
    "dualgpm, most taken": {"adapter.energy": 0.999999999},
    "rank above what is free": {"adapter.energy": 0.999999999, "adapter.rank": 30},
    "energy of the inputs": {"adapter.energy_of": "inputs", "adapter.energy": 0.9},
}


@pytest.mark.filterwarnings("ignore:.*free directions left")
@pytest.mark.parametrize("changes", NO_INTERFERENCE.values(), ids=NO_INTERFERENCE)
def test_inputs_inside_the_old_memory_give_unchanged_keys_and_values_after_the_next_task(changes, tiny):
    stages = run(override(tiny, changes | {"optim.lr": 0.05, "optim.epochs": 2}))
    before, after = next(stages).state, next(stages).state
    for layer, memory in memories(before).items():
        free_DF = free_basis(memory, 32)
        probe = torch.randn(64, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        inside, outside = probe - probe @ free_DF @ free_DF.T, probe @ free_DF @ free_DF.T
        changes_inside, changes_outside = (
            (keys_and_values(after, layer, x) - keys_and_values(before, layer, x)).abs().max()
            for x in (inside, outside)
        )
        assert changes_inside < 1e-5
        assert changes_outside > 1e-3


def test_without_protection_the_same_inputs_change(tiny):
    protected = next(run(override(tiny, NO_INTERFERENCE["gpm"]))).state
    stages = run(of_method(tiny, "sequential", **{"optim.lr": 0.05, "optim.epochs": 2}))
    before, after = next(stages).state, next(stages).state
    for layer, memory in memories(protected).items():
        inside = memory.basis_DK.double().T
        assert (keys_and_values(after, layer, inside) - keys_and_values(before, layer, inside)).abs().max() > 1e-3


def test_both_kinds_of_memory_occur_and_give_the_same_run(tiny):
    dual, plain = (
        list(run(override(tiny, {"adapter.energy": 0.999999, "adapter.memory": memory})))[-1].state
        for memory in ("dualgpm", "gpm")
    )
    assert {memory.kind for memory in memories(dual).values()} == {"retain"}
    assert {memory.kind for memory in memories(plain).values()} == {"remove"}
    torch.testing.assert_close(dual.model, plain.model, atol=1e-3, rtol=0)


@pytest.mark.filterwarnings("ignore:.*free directions left")
def test_a_rank_above_what_is_free_warns_and_goes_on_with_fewer_rows(tiny):
    config = override(tiny, NO_INTERFERENCE["rank above what is free"])
    with pytest.warns(UserWarning, match=r"task 1: .*blocks\.0.* free directions left, fewer than adapter\.rank=30"):
        assert len(list(run(config))) == 5


def test_a_rank_that_fits_does_not_warn(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(run(override(tiny, {"data.tasks": 2})))


@pytest.mark.filterwarnings("ignore:.*free directions left")
def test_with_no_direction_left_the_backbone_stays_and_the_classifiers_still_learn(tiny):
    stages = run(override(tiny, {"adapter.energy": 1.0}))
    first = next(stages).state
    full = {f"{name.removesuffix('.weight')}.retain": torch.zeros(32, 0) for name in first.model if "qkv" in name}
    second = next(run(override(tiny, {"adapter.energy": 1.0}), first._replace(adapter=full))).state
    assert same_tensors(*({n: t for n, t in s.model.items() if "qkv" in n} for s in (first, second)))
    assert "heads.1.weight" in second.classifier


def test_only_the_first_blocks_are_adapted_when_so_configured(tiny):
    state = next(run(override(tiny, {"adapter.blocks": 1}))).state
    plain = build_backbone(tiny.backbone).blocks[0].attn.qkv.weight
    assert [name for name in state.model if "qkv" in name] == ["backbone.blocks.0.attn.qkv.weight"]
    assert not torch.equal(state.model["backbone.blocks.0.attn.qkv.weight"], plain)


def test_the_schedule_of_a_longer_stream_gives_the_memory_less_after_the_same_task(tiny):
    sizes = []
    for total in (5, 500):
        changes = {"adapter.total_tasks": total, "adapter.energy": 0.8, "adapter.energy_of": "inputs"}
        *_, last = (result.state for result in run(override(tiny, changes)))
        sizes.append(sum(32 - free_basis(memory, 32).shape[1] for memory in memories(last).values()))
    assert sizes[1] < sizes[0]


# Killed and resumed.


@pytest.mark.filterwarnings("ignore:.*free directions left")
def test_a_run_whose_memory_has_turned_into_its_complement_resumes_bit_for_bit(tiny, tmp_path):
    config = override(tiny, {"adapter.energy": 0.999999})
    whole = list(run(config))
    save_state(whole[1].state, tmp_path)
    assert {memory.kind for memory in memories(load_state(tmp_path)).values()} == {"retain"}
    assert same_state(list(run(config, load_state(tmp_path)))[-1].state, whole[-1].state)


@pytest.mark.parametrize("change", [{"seed": 1}, {"adapter.rank": 3}, {"data.order_seed": 0}], ids=str)
def test_another_runs_state_is_refused(change, tiny, results):
    with pytest.raises(StateError, match=f"belongs to run {config_hash(tiny)} on validation"):
        next(run(override(tiny, change), results[0].state))


def test_a_state_evaluated_on_other_images_is_refused(tiny, results):
    with pytest.raises(StateError, match=r"on validation, this is .* on test"):
        next(run(tiny, results[0].state, evaluate_on="test"))


@pytest.mark.parametrize("name", ["content_hash", "split_hash"])
def test_a_state_is_not_continued_on_a_store_prepared_from_other_images_or_split_otherwise(name, tiny, results):
    state = results[3].state
    assert len(getattr(state.data, name)) == 16
    other, older = (state._replace(data=state.data.model_copy(update={name: said})) for said in ("0" * 16, None))
    with pytest.raises(StateError, match="of another digits than is here"):
        next(run(tiny, other))
    assert len(list(run(tiny, older))) == 1


def test_a_state_is_not_continued_on_another_backbones_weights(tiny, tmp_path):
    configs = []
    for name in "ab":
        vit = build_backbone(tiny.backbone)
        with torch.no_grad():
            vit.norm.weight *= 1 if name == "a" else 2
        save_file(vit.state_dict(), tmp_path / f"{name}.safetensors")
        configs.append(override(tiny, {"backbone.weights": tmp_path / f"{name}.safetensors"}))
    state = next(run(configs[0])).state
    with pytest.raises(StateError):
        next(run(configs[1], state))


# A run's folder.


def test_a_finished_run_leaves_its_config_its_state_and_its_result(tiny, results, tmp_path):
    state = train_into(tmp_path, tiny, "validation")
    assert same_state(state, results[-1].state)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "state", "adapters", "result.json"}
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["metrics"] == results[-1].metrics
    assert result["identity"] == identity(tiny)


def test_resuming_a_finished_run_keeps_the_versions_that_it_was_trained_with(tiny, tmp_path, monkeypatch):
    config = of_method(tiny, "joint")
    train_into(tmp_path, config, "validation")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    monkeypatch.setattr("inflora.setup.version", lambda package: "a later one")
    train_into(tmp_path, config, "validation", resume=True)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("lost", ["config.yaml", "result.json"])
def test_resuming_a_run_that_was_killed_between_two_files_completes_it(lost, tiny, tmp_path):
    config = of_method(tiny, "joint")
    train_into(tmp_path, config, "validation")
    before = (tmp_path / lost).read_text()
    (tmp_path / lost).unlink()
    train_into(tmp_path, config, "validation", resume=True)
    assert (tmp_path / lost).read_text() == before


@pytest.mark.parametrize("name", ["config.yaml", "result.json"])
def test_a_file_that_this_run_did_not_write_is_not_overwritten(name, tiny, tmp_path):
    (tmp_path / name).write_text("somebody's")
    with pytest.raises(ConfigError, match=name):
        train_into(tmp_path, of_method(tiny, "joint"), "validation")
    assert (tmp_path / name).read_text() == "somebody's"


# What a trial cannot reach, and what is refused beforehand.


@pytest.mark.parametrize("damage", ["deleted", "garbage"])
def test_a_whole_trial_runs_without_the_test_images(damage, tiny, results, digits, tmp_path):
    shutil.copytree(digits, tmp_path / "digits")
    file = tmp_path / "digits" / "test-00000.arrow"
    file.unlink() if damage == "deleted" else file.write_bytes(b"garbage")
    config = override(tiny, {"data.root": tmp_path})
    assert same_state(list(run(config))[-1].state, results[-1].state)
    assert identity(config) == identity(tiny)
    with pytest.raises(DataError, match=r"test-00000\.arrow"):
        next(run(config, evaluate_on="test"))


def test_training_on_the_validation_images_is_refused_while_choosing(tiny):
    config = override(tiny, {"data.train_on": "train+validation"})
    with pytest.raises(ConfigError, match="leaves no validation images"):
        next(run(config))
    assert next(run(config, evaluate_on="test")).task == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter.rank": 33}, r"adapter\.rank must be at most the backbone's width 32, got 33"),
        ({"adapter.blocks": 3}, r"adapter\.blocks must be at most the backbone's depth 2, got 3"),
        ({"data.tasks": 3}, r"data\.tasks must divide the 10 classes"),
        ({"data.dataset": "mnist"}, r"unknown data\.dataset 'mnist'; known: .*digits"),
        ({"backbone": {"name": "resnet18", "pretrained": False}}, "it has no attention blocks"),
        ({"data.mean": [0.5, 0.5, 0.5]}, r"data\.mean must be one number with backbone glyph_vit"),
        ({"data.std": [0.5, 0.5, 0.5]}, r"data\.std must be one number with backbone glyph_vit"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused_in_one_line_before_anything_heavy(
    change, message, tiny, monkeypatch
):
    for heavy in ("build_backbone", "make_stream"):
        monkeypatch.delattr(f"inflora.setup.{heavy}")
    with pytest.raises(ConfigError, match=message) as error:
        next(run(override(tiny, change)))
    assert len(str(error.value).splitlines()) == 1


def test_the_largest_rank_and_all_blocks_fit(tiny):
    check(override(tiny, {"adapter.rank": 32, "adapter.blocks": 2}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused(tiny):
    with pytest.raises(ConfigError, match="PyTorch finds no CUDA device"):
        check(override(tiny, {"device": "cuda"}))


def test_a_runs_identity_names_what_its_numbers_depend_on(tiny):
    known = identity(tiny)
    assert known["config_hash"] == config_hash(tiny)
    assert known["class_order"] == "0,1,2,3,4,5,6,7,8,9"
    assert identity(override(tiny, {"data.split_seed": 1}))["split_hash"] != known["split_hash"]
    options = tiny.backbone.options | {"depth": 1}
    assert identity(override(tiny, {"backbone.options": options}))["backbone_hash"] != known["backbone_hash"]


# What is given in place of drawn: docs/fidelity.md.


def orders_of(config: RunConfig) -> dict[str, Tensor]:
    """Every pass of a run, in reverse order of the stored images."""
    stream = make_stream(config.data, "validation")
    names = ["covariance-before", "covariance-after", *(f"train-{epoch}" for epoch in range(config.optim.epochs))]
    return {f"{task.index}/{name}": task.train_rows.flip(0).clone() for task in stream.tasks for name in names}


def test_a_given_order_is_the_order_of_the_batches_whatever_the_seed(tiny, tmp_path):
    save_file(orders_of(tiny), tmp_path / "orders.safetensors")
    given = {"replay.orders": tmp_path / "orders.safetensors", "data.augment": "none", "optim.head_init": "zero"}
    one, other = (next(run(override(tiny, given | {"seed": seed}))) for seed in (0, 1))
    assert one.step_losses == other.step_losses
    assert same_tensors(one.state.model, other.state.model)
    assert next(run(override(tiny, given | {"replay.orders": None}))).step_losses != one.step_losses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda orders: orders.pop("4/train-0"), r"replay\.orders must hold 4/train-0; it holds 0/cov"),
        (lambda orders: orders.pop("4/covariance-after"), r"must hold 4/covariance-after; it holds 0/cov"),
        (lambda orders: orders["4/train-0"].__setitem__(0, -1), r"must name each of the \d+ images of task 4 once"),
    ],
)
def test_an_order_that_is_not_of_this_run_is_refused_before_the_first_task(change, message, tiny, tmp_path):
    orders = orders_of(tiny)
    change(orders)
    save_file(orders, tmp_path / "orders.safetensors")
    with pytest.raises(ConfigError, match=message) as error:
        next(run(override(tiny, {"replay.orders": tmp_path / "orders.safetensors"})))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("setting", ["replay.orders", "replay.heads", "replay.draws"])
def test_a_file_that_cannot_be_read_is_refused_before_anything_heavy(setting, tiny, tmp_path):
    file = tmp_path / "file.safetensors"
    config = override(tiny, pair_of("inflora", "aligned") | {setting: file})
    for content, message in ((None, f"cannot read {setting}"), ({}, "holds no tensors"), ({"a": torch.inf}, "finite")):
        if content is not None:
            save_file({name: torch.tensor([value]) for name, value in content.items()}, file)
        with pytest.raises(ConfigError, match=message) as error:
            check(config)
        assert setting in str(error.value)


def heads_of_zeros() -> dict[str, Tensor]:
    return {f"{t}.{name}": torch.zeros(shape) for t in range(5) for name, shape in HEAD.items()}


def draws_of_ones(epochs: int = 2) -> dict[str, Tensor]:
    """What the tiny run's classifiers are aligned on after each task but the first."""
    names = [f"{t}/{{}}-{epoch}" for t in range(1, 5) for epoch in range(epochs)]
    features = {name.format("features"): torch.ones(3, 32) for name in names}
    return features | {name.format("classes"): torch.tensor([0, 1, 2]) for name in names}


def refusal_of(config: RunConfig) -> str:
    """The one line that the run ends with before its first task."""
    with pytest.raises(ConfigError) as error:
        next(run(config))
    (line,) = str(error.value).splitlines()
    return line


def test_classifiers_start_from_given_values(tiny, tmp_path):
    heads = {name: 0.1 * int(name[0]) + tensor for name, tensor in heads_of_zeros().items()}
    save_file(heads, tmp_path / "heads.safetensors")
    config = of_method(tiny, "frozen", **{"replay.heads": tmp_path / "heads.safetensors", "optim.lr": 1e-12})
    stages = run(config)
    for t in (0, 1):
        classifier = next(stages).state.classifier
        for name in HEAD:
            torch.testing.assert_close(classifier[f"heads.{t}.{name}"], heads[f"{t}.{name}"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"4.weight": None}, r"replay\.heads must hold 4\.weight; it holds 0\.bias, 0\.weight, "),
        ({"4.bias": torch.zeros(3)}, r"replay\.heads must hold 4\.bias \(2,\), got \(3,\)"),
    ],
)
def test_classifiers_that_are_not_of_this_run_are_refused_before_the_first_task(change, message, tiny, tmp_path):
    heads = heads_of_zeros() | change
    save_file({name: t for name, t in heads.items() if t is not None}, tmp_path / "heads.safetensors")
    assert re.match(message, refusal_of(override(tiny, {"replay.heads": tmp_path / "heads.safetensors"})))


@pytest.mark.parametrize("change", [{"features": torch.ones(3, 31)}, {"classes": torch.tensor([0, 1, 10])}], ids=str)
def test_features_that_are_not_of_this_run_are_refused_before_the_first_task(change, tiny, tmp_path):
    draws = draws_of_ones() | {f"4/{part}-1": tensor for part, tensor in change.items()}
    save_file(draws, tmp_path / "draws.safetensors")
    config = override(tiny, pair_of("inflora", "aligned") | {"replay.draws": tmp_path / "draws.safetensors"})
    message = "replay.draws must hold in 4/features-1 rows of 32 numbers and in 4/classes-1 as many classes below 10"
    assert refusal_of(config).startswith(message)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("orders", ["0/train-1", "5/train-0", "0/train", "nonsense"]),
        ("heads", ["5.weight", "0.scale"]),
        ("draws", ["0/features-0", "1/features-2", "5/classes-0"]),
    ],
)
def test_a_file_that_holds_more_than_the_run_asks_for_is_of_another_run_and_refused(kind, more, tiny, tmp_path):
    """A longer one, mostly: its numbers would be compared with this run's."""
    whole = {"orders": orders_of(tiny), "heads": heads_of_zeros(), "draws": draws_of_ones()}[kind]
    config = override(tiny, pair_of("inflora", "aligned") | {f"replay.{kind}": tmp_path / "file.safetensors"})
    save_file(whole, tmp_path / "file.safetensors")
    assert next(run(config)).task == 0
    for name in more:
        save_file(whole | {name: torch.zeros(2)}, tmp_path / "file.safetensors")
        assert refusal_of(config) == f"replay.{kind} holds {name}, which this run does not ask for"


HEAD = {"weight": (2, 32), "bias": (2,)}


# What is known of the training, and of the inside.


def test_every_epochs_losses_and_learning_rates_are_known(tiny):
    changes = {"optim.epochs": 3, "optim.lr": 0.01, "optim.head_lr": 0.02, "optim.first_task": {"lr": 0.1, "epochs": 2}}
    schedule = {"optim.schedule": "step", "optim.milestones": [1], "optim.decay": 0.5}
    first, second = itertools.islice(run(override(tiny, changes | schedule)), 2)
    for result, lr, head_lr in ((first, [0.1, 0.05], [0.02, 0.01]), (second, [0.01, 0.005, 0.005], [0.02, 0.01, 0.01])):
        assert [epoch.lr for epoch in result.epochs] == pytest.approx(lr)
        assert [epoch.head_lr for epoch in result.epochs] == pytest.approx(head_lr)
    assert second.step_losses == [epoch.losses for epoch in second.epochs]
    assert second.losses == pytest.approx([sum(epoch.losses) / len(epoch.losses) for epoch in second.epochs])


def test_where_nothing_is_trained_there_are_no_epochs(tiny):
    result = next(run(of_method(tiny, "ncm")))
    assert (result.epochs, result.losses, result.metrics["params/trainable"]) == ([], [], 0)


def test_the_task_aware_row_is_of_each_tasks_own_outputs(tiny):
    _, result = itertools.islice(run(tiny), 2)
    stream, input_format = make_stream(tiny.data, "validation"), InputFormat(tiny.data, 32, 1, torch.device("cpu"))
    for task, accuracy in zip(stream.tasks[:2], result.task_aware, strict=True):
        (batch,) = evaluation_batches(stream.evaluate, task.eval_rows, input_format, 1000)
        with torch.no_grad():
            own = result.model(batch.images)[:, task.first_label : task.first_label + 2].argmax(1)
        assert accuracy == pytest.approx(float((own == batch.labels - task.first_label).float().mean()))


def test_the_memorys_growth_is_reported_for_each_adapted_layer(results):
    for before, now in itertools.pairwise(results):
        for block in range(2):
            size, kept, overlap = (now.metrics[f"memory/block{block}/{name}"] for name in ("size", "kept", "overlap"))
            assert before.metrics[f"memory/block{block}/size"] <= size <= 32
            assert 0 < overlap <= kept + 0.05 <= 1.05
    state = results[-1].state
    for layer, memory in memories(state).items():
        assert results[-1].metrics[f"memory/block{layer.split('.')[2]}/size"] == 32 - free_basis(memory, 32).shape[1]


def test_the_energy_kept_reaches_the_threshold_of_the_task(tiny):
    *_, last = run(override(tiny, {"adapter.energy": 0.9, "adapter.targets": ["v", "mlp.fc2"]}))
    kept = {name: value for name, value in last.metrics.items() if name.endswith("/kept")}
    assert kept.keys() == {f"memory/block{block}{layer}/kept" for block in range(2) for layer in ("", ".mlp.fc2")}
    assert min(kept.values()) >= 0.98 - 1e-6


def test_features_of_old_tasks_drift_when_the_backbone_changes_and_only_then(tiny, results):
    moving, still = results[2].metrics, list(run(of_method(tiny, "frozen", **{"data.tasks": 2})))[1].metrics
    assert {name for name in moving if name.startswith("drift/")} == {"drift/task0", "drift/task1", "drift/mean"}
    assert moving["drift/mean"] > 1e-4
    assert moving["drift/mean"] == pytest.approx((moving["drift/task0"] + moving["drift/task1"]) / 2)
    assert still["drift/task0"] == 0


def test_the_factors_handed_back_are_what_the_weights_have_gained(tiny, results):
    first, second = results[0], results[1]
    for name in ("backbone.blocks.0.attn.qkv", "backbone.blocks.1.attn.qkv"):
        gained = second.state.model[f"{name}.weight"] - first.state.model[f"{name}.weight"]
        update = second.factors[f"{name}.lora_B"] @ second.factors[f"{name}.lora_A"]
        torch.testing.assert_close(gained, torch.cat([torch.zeros(32, 32), update]), atol=1e-6, rtol=0)


def test_a_tasks_model_may_be_asked_until_the_next_one_begins(tiny):
    result = next(run(tiny))
    assert same_tensors(result.model.learnt_state(), result.state.model)


# Speed: nothing computed twice, and the precision and compilation asked for.


def test_evaluation_looks_at_every_image_once_and_drift_looks_at_none(tiny, monkeypatch):
    seen, evaluated = [], []
    features, on_tasks = ContinualModel.features, continual.evaluate
    monkeypatch.setattr(ContinualModel, "features", lambda self, x: (seen.append(len(x)), features(self, x))[1])

    def counted(*args):
        seen.clear()
        found = on_tasks(*args)
        evaluated.append(sum(counts.images for counts in found))
        return found

    monkeypatch.setattr(continual, "evaluate", counted)
    result = next(run(tiny))
    assert sum(seen) == evaluated[0] > 0
    task = make_stream(tiny.data, "validation").tasks[0]
    assert len(result.state.probes["0"]) == min(64, len(task.eval_rows))


def test_probes_are_the_features_of_images_spread_over_each_task():
    tasks = [Task(index, 2 * index, ("a", "b"), torch.arange(0), torch.arange(n)) for index, n in enumerate((3, 200))]
    features = torch.arange(203.0)[:, None].expand(-1, 2)
    probes = Probes(tasks, 2, torch.device("cpu"))
    for places in torch.arange(203).split(50):
        probes.see(places, features[places])
    first, second = probes.features()["0"][:, 0], probes.features()["1"][:, 0]
    assert first.tolist() == [0, 1, 2]
    assert (len(second.unique()), second[0], second[-1]) == (64, 3, 202)
    assert set(second.diff().tolist()) == {3, 4}


def test_in_bf16_a_run_learns_what_it_learns_in_float32_and_says_so(tiny, results):
    in_bf16 = list(run(override(tiny, {"precision": "bf16"})))
    assert {result.metrics["precision/bits"] for result in in_bf16} == {16}
    assert {result.metrics["precision/bits"] for result in results} == {32}
    for ours, theirs in zip(in_bf16, results, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=0.05)
        kept = itertools.chain.from_iterable(group.values() for group in ours.state.tensors.values())
        assert all(tensor.dtype != torch.bfloat16 for tensor in kept)
    again = next(run(override(tiny, {"precision": "bf16"})))
    assert same_state(again.state, in_bf16[0].state)


@pytest.mark.e2e
def test_a_compiled_backbone_is_not_compiled_again_for_later_tasks(tiny, results, monkeypatch):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compile_with = nn.Module.compile

    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_with(self, backend=backend))
    after_task = [(len(graphs), result) for result in run(override(tiny, {"compile": True}))]
    assert after_task[0][0] > 0
    assert after_task[-1][0] == after_task[1][0]
    assert after_task[-1][1].losses == pytest.approx(results[-1].losses, rel=1e-3)


def test_prompts_and_compilation_do_not_go_together(tiny):
    with pytest.raises(ConfigError, match="compile must be false with adapter l2p"):
        check(of_method(tiny, "l2p", compile=True))
