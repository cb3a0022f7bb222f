"""A model is adaptable when it has shown it: every adapter has an effect, and the same one when it is merged."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from inflora import probe
from inflora.config import ConfigError
from inflora.injection import inject
from inflora.lora import LoRALinear, adapted_layers

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 0}


@pytest.fixture
def asked(monkeypatch) -> None:
    """timm's own layers, which are known to be adaptable, have to show it too."""
    monkeypatch.setattr(probe, "_is_timms_own", lambda vit: False)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_that_reads_weights_past_their_layers_is_refused_in_one_line(device):
    with torch.device(device):
        eva = timm.create_model("eva02_tiny_patch14_224", depth=1, num_classes=0, img_size=28)
    with pytest.raises(
        ConfigError, match=r"^Eva cannot be adapted: it reads the weight of blocks\.0\.attn\.qkv without"
    ):
        inject(eva)


@pytest.mark.parametrize(("targets", "admitted"), [(("k", "v"), False), (("q", "k", "v"), True)], ids=str)
def test_q_k_and_v_laid_out_head_by_head_are_adapted_together_or_not_at_all(targets, admitted):
    """maxvit's qkv holds q, k and v of the first head, then those of the second."""
    maxvit = timm.create_model("test_maxvit", num_classes=0)
    if admitted:
        inject(maxvit, targets=targets)
    else:
        with pytest.raises(ConfigError, match="does not hold q, k and v as equal parts one after another"):
            inject(maxvit, targets=targets)


def test_gates_that_an_untrained_model_keeps_shut_are_opened_for_the_proof_alone():
    """Swin v2 scales what each block adds by a norm whose weight begins at zero."""
    model = timm.create_model("test_vit4", depth=1, num_classes=0, img_size=64, init_values=1e-9)
    gates = [parameter for name, parameter in model.named_parameters() if name.endswith("gamma")]
    assert gates and all((gate == 1e-9).all() for gate in gates)
    inject(model)
    assert all(
        mine is theirs
        for mine, theirs in zip(gates, (p for n, p in model.named_parameters() if n.endswith("gamma")), strict=True)
    )
    assert all((gate == 1e-9).all() for gate in gates)


def test_an_adapter_that_cannot_matter_is_refused(asked):
    """With a single token attention has nothing to weigh."""
    vit = VisionTransformer(**TINY | {"img_size": 8}, class_token=False, global_pool="avg")
    with pytest.raises(ConfigError, match="has no effect on the features"):
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
    features = probe._features
    monkeypatch.setattr(probe, "_features", lambda *given: shown.append(0) or features(*given))
    inject(VisionTransformer(**TINY, init_values=1e-5), targets=targets)
    assert not shown
    monkeypatch.setattr(probe, "_is_timms_own", lambda vit: False)
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
