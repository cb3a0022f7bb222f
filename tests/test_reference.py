"""The method against a recorded run of the InfLoRA authors' experiment code, number by number."""

from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from inflora.config import InfLoRASettings, OptimSettings
from inflora.data.loader import Batch
from inflora.data.stream import Task
from inflora.lora import adapted_layers
from inflora.methods import make_method
from inflora.methods.base import TaskData
from inflora.model import ContinualModel
from inflora.training import train_task

TRACE = Path(__file__).parents[2] / "shared" / "reference" / "a_adam.npz"
CLASSES, BATCH, TASKS = 4, 32, 5


def largest_difference(ours, theirs):
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    return float((ours - theirs).abs().max().detach() / theirs.abs().max())


@pytest.mark.skipif(not TRACE.exists(), reason="the recorded trace is not beside this checkout (../shared/reference)")
def test_every_task_of_the_recorded_run_is_reproduced():
    trace = {name: torch.from_numpy(array) for name, array in np.load(TRACE).items() if array.dtype.kind in "iufb"}
    position = torch.empty(20, dtype=torch.int64)
    position[trace["class_order"].long()] = torch.arange(20)
    images = trace["x_train"].permute(0, 3, 1, 2).float() / 255
    labels = position[trace["y_train"].long()]
    test_images = trace["x_test"].permute(0, 3, 1, 2).float() / 255

    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=4, num_classes=0, norm_layer=None, qkv_bias=True
    )
    vit.load_state_dict({n.removeprefix("backbone/"): t for n, t in trace.items() if n.startswith("backbone/")})
    model = ContinualModel(vit, 64)
    method = make_method(InfLoRASettings(rank=4, energy=0.95))
    method.prepare(model)

    for t in range(TASKS):
        rows = ((labels >= t * CLASSES) & (labels < (t + 1) * CLASSES)).nonzero()[:, 0]
        task = Task(t, t * CLASSES, tuple("abcd"), rows, rows[:0])

        def passes(purpose, t=t, rows=rows):
            kind, _, epoch = purpose.partition("-")
            order = {
                "train": lambda: trace[f"t{t}/order_train"][int(epoch)],
                "covariance": lambda: trace[f"t{t}/order_{'pre' if epoch == 'before' else 'post'}"],
            }[kind]()
            for chosen in order.long().split(BATCH):
                yield Batch(images[chosen], labels[chosen], 1.0)

        head = model.add_head(CLASSES, "zero", torch.Generator())
        head.load_state_dict({"weight": trace["head_w_init"][t], "bias": trace["head_b_init"][t]})
        data = TaskData(task, TASKS + 1, 0, passes)  # the recorded run updates its memory after the last task too
        method.settings = method.settings.model_copy(update={"total_tasks": TASKS})
        method.begin_task(model, data)
        for index, (_, layer) in enumerate(adapted_layers(model)):
            recorded = trace[f"t{t}/lora_A"][index]
            assert largest_difference(layer.lora_A.T @ layer.lora_A, recorded.T @ recorded) < 5e-4

        losses = train_task(model, method, task, OptimSettings(epochs=10, batch_size=BATCH), passes, lambda _: None)
        torch.testing.assert_close(torch.tensor(losses), trace[f"t{t}/loss_epoch"].float(), atol=1e-4, rtol=0)
        for index, (_, layer) in enumerate(adapted_layers(model)):
            theirs = [trace[f"t{t}/lora_B_{x}"][index] @ trace[f"t{t}/lora_A"][index] for x in "kv"]
            assert largest_difference(layer.lora_B @ layer.lora_A, torch.cat(theirs)) < 1e-3

        method.end_task(model, data)
        for index, (name, _) in enumerate(adapted_layers(model)):
            memory = method.memory[name]
            assert memory.kind == ("retain" if trace[f"t{t}/gpm_retain"][index] else "remove")
            assert memory.basis_DK.shape[1] == trace[f"t{t}/gpm_dim"][index]
            projector = memory.basis_DK @ memory.basis_DK.T
            assert largest_difference(projector, trace[f"t{t}/gpm_proj"][index]) < 1e-4

        with torch.no_grad():
            logits = model.logits(model.features(test_images[trace[f"t{t}/test_index"].long()]))
        assert largest_difference(logits, trace[f"t{t}/test_logits"]) < 5e-4
        accuracy = 100 * (logits.argmax(1) == trace[f"t{t}/test_label"]).float().mean()
        assert accuracy == pytest.approx(float(trace["acc_total"][t]), abs=0.01)
