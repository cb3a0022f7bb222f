"""A model is adaptable when it has shown it: every adapter has an effect, and the same one when it is merged."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from inflora import injection
from inflora.config import ConfigError
from inflora.injection import inject
from inflora.lora import LoRALinear, adapted_layers

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 0}


@pytest.fixture
def asked(monkeypatch) -> None:
    """timm's own layers, which are known to be adaptable, have to show it too."""
    monkeypatch.setattr(injection, "_is_timms_own", lambda vit: False)


def test_a_model_that_reads_weights_past_their_layers_is_refused_in_one_line():
    eva = timm.create_model("eva02_tiny_patch14_224", depth=1, num_classes=0, img_size=28)
    with pytest.raises(ConfigError, match=r"^Eva cannot be adapted: it reads blocks\.0\.attn\.qkv past its adapter"):
        inject(eva)


def test_an_adapter_that_cannot_matter_is_refused(asked):
    """With a single token attention has nothing to weigh."""
    vit = VisionTransformer(**TINY | {"img_size": 8}, class_token=False, global_pool="avg")
    with pytest.raises(ConfigError, match="past its adapter, which has no effect"):
        inject(vit, targets=("q", "k"))


class MergesHalf(LoRALinear):
    def add_update(self, weight, lora_A, lora_B):
        super().add_update(weight, lora_A, 0.5 * lora_B)


def test_a_layer_whose_merged_adapter_computes_something_else_is_refused(asked):
    with pytest.raises(ConfigError, match="merged adapters do not compute what unmerged ones do"):
        inject(VisionTransformer(**TINY), layer_type=MergesHalf)


@pytest.mark.parametrize("targets", [("k", "v"), ("q", "k", "v", "attn.proj", "mlp.fc1", "mlp.fc2")])
def test_timm_s_own_layers_show_it_and_are_not_asked_again_in_every_trial(targets, monkeypatch):
    shown = []
    features = injection._features
    monkeypatch.setattr(injection, "_features", lambda *given: shown.append(0) or features(*given))
    inject(VisionTransformer(**TINY, init_values=1e-5), targets=targets)
    assert not shown
    monkeypatch.setattr(injection, "_is_timms_own", lambda vit: False)
    inject(VisionTransformer(**TINY, init_values=1e-5), targets=targets)
    assert shown


@pytest.mark.parametrize("training", [True, False])
def test_showing_it_leaves_the_model_and_all_randomness_as_they_were(training, asked):
    vit = VisionTransformer(**TINY, proj_drop_rate=0.5)
    vit.train(training)
    before, modes = {n: t.clone() for n, t in vit.state_dict().items()}, [m.training for m in vit.modules()]
    random = torch.get_rng_state()
    inject(vit)
    assert torch.equal(torch.get_rng_state(), random)
    assert vit.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
    assert [m.training for m in vit.modules()] == modes
    assert all(layer.lora_A is None and layer.lora_B is None for _, layer in adapted_layers(vit))
    assert all(parameter.grad is None for parameter in vit.parameters())


def test_a_model_that_cannot_compute_is_refused_in_one_line(asked):
    vit = VisionTransformer(**TINY)
    vit.norm = nn.Linear(5, 5)
    with pytest.raises(ConfigError, match="it does not compute") as error:
        inject(vit)
    assert len(str(error.value).splitlines()) == 1
