"""The method against a recorded run of the InfLoRA authors' experiment code, number by number.

The recorded run is replayed through the public seams that docs/fidelity.md describes, and through nothing else.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from inflora.adapters.memories import memory_of
from inflora.config import ConfigError, RunConfig, override, parse_config
from inflora.continual import TaskResult, run
from inflora.data import prepare_store
from inflora.data.source import Arrays, Dataset, Options, Source

TRACE = Path(__file__).parents[2] / "shared" / "reference" / "a_adam.npz"
TASKS, LAYERS = 5, 3

pytestmark = pytest.mark.skipif(
    not TRACE.exists(), reason="the recorded trace is not beside this checkout (../shared/reference)"
)


@pytest.fixture(scope="module")
def trace() -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in np.load(TRACE).items() if array.dtype.kind in "iufb"}


@pytest.fixture(scope="module")
def replay(trace, tmp_path_factory) -> RunConfig:
    """The recorded run's settings, with its images, weights, classifiers and orders."""
    folder = tmp_path_factory.mktemp("replay")
    prepare_store("trace", Dataset(lambda *_: images_of(trace), needs=None), folder, Options(), root=str(folder))
    return replay_config(trace, folder)


@pytest.fixture(scope="module")
def replayed(trace, replay) -> list[tuple[TaskResult, Tensor]]:
    """Each task of the recorded run again, and its test logits."""
    results = []
    for t, result in enumerate(run(replay, evaluate_on="test")):
        images = trace["x_test"][trace[f"t{t}/test_index"].long()].permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            results.append((result, result.model(images)))
    return results


def images_of(trace: dict[str, Tensor]) -> Source:
    """The images, with their labels renumbered in the order they are learnt."""
    place = torch.empty(20, dtype=torch.int64)
    place[trace["class_order"].long()] = torch.arange(20)
    train, test = (Arrays(trace[f"x_{s}"].numpy(), place[trace[f"y_{s}"].long()].numpy()) for s in ("train", "test"))
    return Source("the trace", tuple(f"{k:02}" for k in range(20)), {"train": train, "test": test})


def replay_config(trace: dict[str, Tensor], folder: Path) -> RunConfig:
    weights = {name.removeprefix("backbone/"): t for name, t in trace.items() if name.startswith("backbone/")}
    heads, orders = {}, {}
    for t in range(TASKS):
        heads |= {f"{t}.weight": trace["head_w_init"][t].clone(), f"{t}.bias": trace["head_b_init"][t].clone()}
        orders |= {f"{t}/covariance-before": trace[f"t{t}/order_pre"]}
        orders |= {f"{t}/train-{epoch}": rows.clone() for epoch, rows in enumerate(trace[f"t{t}/order_train"])}
        orders |= {f"{t}/covariance-after": trace[f"t{t}/order_post"]}
    for name, tensors in {"weights": weights, "heads": heads, "orders": orders}.items():
        save_file(tensors, folder / f"{name}.safetensors")
    options = {"img_size": 32, "patch_size": 8, "in_chans": 3, "embed_dim": 64, "depth": LAYERS, "num_heads": 4}
    return parse_config(
        {
            "data": {
                "dataset": "trace",
                "root": folder,
                "tasks": TASKS,
                "train_on": "train+validation",
                "augment": "none",
            },
            "backbone": {"name": "glyph_vit", "weights": folder / "weights.safetensors", "options": options},
            "adapter": {"name": "inflora", "rank": 4, "energy": 0.95},
            "classifier": "linear",
            "optim": {"lr": 5e-4, "epochs": 10, "batch_size": 32},
            "replay": {name: folder / f"{name}.safetensors" for name in ("orders", "heads")},
            "device": "cpu",
        }
    )


def largest_difference(ours, theirs) -> float:
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    return float((ours - theirs).abs().max() / theirs.abs().max())


EVERY_TASK = pytest.mark.parametrize("t", range(TASKS))
EVERY_LAYER = pytest.mark.parametrize("layer", range(LAYERS))


@EVERY_TASK
def test_losses(t, trace, replayed):
    result, _ = replayed[t]
    torch.testing.assert_close(torch.tensor(result.step_losses).double(), trace[f"t{t}/loss_step"], atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(result.losses).double(), trace[f"t{t}/loss_epoch"], atol=1e-4, rtol=0)


@EVERY_TASK
def test_learning_rates(t, trace, replayed):
    """One for both: the recorded run trains classifiers as fast as adapters."""
    for rates in ([epoch.lr for epoch in replayed[t][0].epochs], [epoch.head_lr for epoch in replayed[t][0].epochs]):
        assert torch.tensor(rates).double() == pytest.approx(trace[f"t{t}/lr_epoch"].double(), rel=1e-6, abs=1e-12)


@EVERY_TASK
@EVERY_LAYER
def test_designed_and_trained_matrices(t, layer, trace, replayed):
    factors = replayed[t][0].factors
    lora_A, lora_B = (factors[f"backbone.blocks.{layer}.attn.qkv.{name}"] for name in ("lora_A", "lora_B"))
    recorded_A = trace[f"t{t}/lora_A"][layer]
    recorded_B = torch.cat([trace[f"t{t}/lora_B_k"][layer], trace[f"t{t}/lora_B_v"][layer]])
    assert largest_difference(lora_A.T @ lora_A, recorded_A.T @ recorded_A) < 5e-4
    assert largest_difference(lora_B @ lora_A, recorded_B @ recorded_A) < 1e-3


@EVERY_TASK
@EVERY_LAYER
def test_memory(t, layer, trace, replayed):
    memory = memory_of(replayed[t][0].state.adapter)[f"backbone.blocks.{layer}.attn.qkv"]
    assert memory.kind == ("retain" if trace[f"t{t}/gpm_retain"][layer] else "remove")
    assert memory.basis_DK.shape[1] == trace[f"t{t}/gpm_dim"][layer]
    projector = memory.basis_DK @ memory.basis_DK.T
    assert largest_difference(projector, trace[f"t{t}/gpm_proj"][layer]) < 1e-4


@EVERY_TASK
def test_classifiers_and_logits(t, trace, replayed):
    result, logits = replayed[t]
    assert largest_difference(logits, trace[f"t{t}/test_logits"]) < 5e-4
    for j in range(t + 1):
        weight, bias = (result.state.classifier[f"heads.{j}.{name}"] for name in ("weight", "bias"))
        assert largest_difference(weight, trace[f"t{t}/head_w"][j]) < 5e-4
        assert largest_difference(bias, trace[f"t{t}/head_b"][j]) < 5e-4


@EVERY_TASK
def test_accuracies(t, trace, replayed):
    result, _ = replayed[t]
    assert 100 * result.metrics["acc/seen"] == pytest.approx(float(trace["acc_total"][t]), abs=0.01)
    assert 100 * torch.tensor(result.accuracies).double() == pytest.approx(trace["acc_matrix"][t, : t + 1], abs=0.01)
    task_aware = trace["acc_with_task_matrix"][t, : t + 1]
    assert 100 * torch.tensor(result.task_aware).double() == pytest.approx(task_aware, abs=0.01)
    assert 100 * result.metrics["acc/task_aware"] == pytest.approx(float(trace["acc_with_task_total"][t]), abs=0.01)
    assert result.metrics["acc/task_identity"] == pytest.approx(float(trace["acc_task_id"][t]), abs=1e-4)


def test_a_recording_of_more_epochs_than_the_run_has_is_refused(replay):
    with pytest.raises(ConfigError, match=r"^replay\.orders holds 0/train-9, which this run does not ask for$"):
        next(run(override(replay, {"optim.epochs": 9}), evaluate_on="test"))
