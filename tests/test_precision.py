"""In which precision products are taken: the one asked for, what must be exact always in float32."""

import pytest
import torch
from timm.layers import Attention

from inflora.config import ConfigError
from inflora.covariance import gather_covariance
from inflora.lora import LoRALinear
from inflora.precision import float32_products, pick_precision, products
from inflora.prompts import PrefixAttention
from tests.simulated_gpu import DEVICE, simulated_gpu

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "width", "cpu", "chosen"),
    [
        ("auto", 768, {"avx512_bf16": True}, "bf16"),
        ("auto", 768, {"amx_bf16": True}, "bf16"),
        ("auto", 128, {"avx512_bf16": True, "amx_bf16": True}, "fp32"),
        ("auto", 768, {"avx512_bf16": False}, "fp32"),
        ("fp32", 768, {"avx512_bf16": True}, "fp32"),
        ("bf16", 128, {}, "bf16"),
    ],
)
def test_precision_is_bf16_where_it_pays_or_is_asked_for(name, width, cpu, chosen, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    assert pick_precision(name, CPU, width) == chosen


@pytest.mark.parametrize(("name", "chosen"), [("auto", "bf16"), ("fp32", "fp32"), ("tf32", "tf32"), ("bf16", "bf16")])
def test_a_gpu_has_every_precision(name, chosen):
    with simulated_gpu():
        assert pick_precision(name, DEVICE, 64) == chosen


@pytest.mark.parametrize(
    ("name", "capability", "bf16", "allowed"), [("tf32", (7, 5), True, "bf16"), ("bf16", (8, 0), False, "tf32")]
)
def test_a_gpu_without_it_refuses_what_it_has_not(name, capability, bf16, allowed, monkeypatch):
    with simulated_gpu():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
        with pytest.raises(ConfigError, match=rf"precision must be one of auto, fp32, {allowed} on .*, got {name}"):
            pick_precision(name, DEVICE, 64)


def test_a_cpu_has_no_tf32():
    with pytest.raises(ConfigError, match="precision must be one of auto, fp32, bf16 on a CPU, got tf32"):
        pick_precision("tf32", CPU, 64)


def test_tf32_is_on_only_while_a_context_of_it_is_open_and_off_for_what_must_be_exact_inside():
    def now() -> tuple[str, str]:
        """Of matrix products, and of convolutions."""
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision

    before = now()
    with float32_products("tf32"):
        assert now() == ("tf32", "tf32")
        with products("fp32", CPU):
            assert now() == ("ieee", "ieee")
        assert now() == ("tf32", "tf32")
    assert now() == before


def test_small_updates_are_not_summed_into_weights_that_tf32_would_round(monkeypatch):
    """Told apart by what the layer multiplies: there is no TF32 on a CPU."""
    layer, inputs = LoRALinear(torch.nn.Linear(8, 4)).requires_grad_(False), torch.randn(5, 8)
    layer.attach(torch.randn(2, 8))
    torch.nn.init.normal_(layer.lora_B)
    multiply, weights = torch.nn.functional.linear, []
    watched = lambda x, weight, bias: weights.append(weight) or multiply(x, weight, bias)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    for precision in ("fp32", "tf32"):
        with float32_products(precision):
            layer(inputs)
    assert not torch.equal(weights[0], layer.weight)
    assert torch.equal(weights[1], layer.weight)


def test_covariances_of_a_model_in_bf16_are_products_of_float32_inputs():
    layer, inputs = LoRALinear(torch.nn.Linear(8, 4)), torch.randn(50, 8)
    with products("bf16", CPU), gather_covariance(torch.nn.Sequential(layer)) as seen:
        layer(inputs)
    exact = inputs.double().T @ inputs.double()
    torch.testing.assert_close(seen["0"].sum_DD, exact, rtol=1e-5, atol=1e-5)
    rounded = inputs.bfloat16().double().T @ inputs.bfloat16().double()
    assert (rounded - exact).abs().max() > 1e-2, "the inputs tell the two apart"


def test_a_prefix_does_not_make_all_keys_and_values_float32(monkeypatch):
    attention = PrefixAttention(Attention(8, 2))
    attention.prefix = (torch.randn(3, 8), torch.randn(3, 8))
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *qkv: seen.extend(t.dtype for t in qkv) or real(*qkv),
    )
    with products("bf16", CPU):
        attention(torch.randn(2, 5, 8))
    assert set(seen) == {torch.bfloat16}
