"""Malformed settings by the hundred: a right answer, or one line and nothing else."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from inflora.backbone import meta_backbone, shape_of
from inflora.config import (
    BackboneSettings,
    RunConfig,
    config_hash,
    dump_config,
    load_config,
    override,
    parse_assignments,
    parse_config,
)
from inflora.pretrained import load_weights
from tests.fuzz.answers import answered
from tests.test_backbone import SMALL, jax_release, teacher, vit_of

pytestmark = pytest.mark.fuzz

MANY = settings(max_examples=400, deadline=None, derandomize=True)
SOME = settings(max_examples=150, deadline=None, derandomize=True)
FEW = settings(max_examples=60, deadline=None, derandomize=True)

PATHS = [
    "seed",
    "data.tasks",
    "data.std",
    "data.augment",
    "data.augment.scale",
    "data.order_seed",
    "data.order",
    "backbone.weights",
    "backbone.options",
    "adapter",
    "adapter.name",
    "adapter.rank",
    "adapter.targets",
    "adapter.adapt_tasks",
    "adapter.features",
    "adapter.merge",
    "classifier",
    "classifier.name",
    "classifier.epochs",
    "classifier.drift",
    "classifier.shrinkage",
    "classifier.features",
    "method",
    "method.name",
    "method.classifier_alignment",
    "optim.lr",
    "optim.head_init",
    "optim.milestones",
    "optim.first_task",
    "replay",
    "replay.orders",
    "provenance",
    "provenance.changed",
]
odd = st.sampled_from(
    [
        True,
        None,
        "",
        0,
        -1,
        2**63,
        10**30,
        1e308,
        1e-320,
        float("inf"),
        float("nan"),
        "a\0b",
        "\ud800",
        "x" * 5000,
        {},
        [],
    ]
)
plain = odd | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "rank", "scale", "changed", "lr"]) | st.text(max_size=5), inner, max_size=3
        )
    ),
    max_leaves=6,
)
yaml_like = st.text(st.sampled_from("abxn01.9-+e:[]{},&*!?|>'\"%@`#~=<\\ \t\n\r\0éü\ufeff\x85"), max_size=40)


def answer(question, *given):
    """What comes back, or the one line that does."""
    return answered(lambda: question(*given))


@MANY
@given(changes=st.dictionaries(st.sampled_from(PATHS) | st.text(max_size=8), values, min_size=1, max_size=3))
def test_overrides_give_a_config_that_can_be_kept_or_one_line(changes):
    config = answer(override, RunConfig(), changes)
    if isinstance(config, RunConfig):
        assert parse_config(config.model_dump()) == config
        assert len(config_hash(config)) == 16


@MANY
@given(text=yaml_like, path=st.sampled_from(PATHS))
def test_assignments_give_plain_values_or_one_line(text, path):
    changes = answer(parse_assignments, [f"{path}={text}"])
    if isinstance(changes, dict):
        answer(override, RunConfig(), changes)


@MANY
@given(content=st.binary(max_size=60) | yaml_like.map(lambda text: text.encode()))
def test_files_of_anything_give_a_config_or_one_line(content, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_bytes(content)
    answer(load_config, file)


def flipped(content: bytes, seed: int) -> bytes:
    """``content`` with one byte changed, put in or taken out."""
    draw = random.Random(seed)
    place, byte = draw.randrange(len(content)), bytes([draw.randrange(256)])
    return content[:place] + draw.choice([byte, byte + content[place : place + 1], b""]) + content[place + 1 :]


@SOME
@given(seed=st.integers(0, 10**9))
def test_a_config_with_a_byte_changed_gives_a_config_or_one_line(seed, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "changed.yaml"
    file.write_bytes(flipped(dump_config(RunConfig(provenance={"changed": ["seed"], "a": "5e-4"})).encode(), seed))
    config = answer(load_config, file)
    if isinstance(config, RunConfig):
        assert parse_config(config.model_dump()) == config


@FEW
@given(
    options=st.dictionaries(
        st.sampled_from(
            ["img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "norm_layer", "act_layer"]
        )
        | st.sampled_from(["qkv_bias", "global_pool", "reg_tokens", "mlp_ratio", "init_values", "attn_layer", "x"]),
        st.sampled_from(
            [0, 1, 2, 8, 16, 32, -1, 2**40, 0.5, 1e300, None, True, "gelu", "rmsnorm", "x", [8, 8], [16], {}]
        ),
        max_size=3,
    ),
    pretrained=st.booleans(),
)
def test_options_give_a_model_that_computes_or_one_line(options, pretrained):
    small = {name: value for name, value in SMALL.items() if name != "num_classes"}
    chosen = parse_config(
        {"backbone": {"options": options if pretrained else small | options, "pretrained": pretrained}}
    )
    model = answer(meta_backbone, chosen.backbone)
    if isinstance(model, torch.nn.Module):
        shape = shape_of(model)
        assert shape.width > 0


@pytest.fixture(scope="module")
def vit() -> torch.nn.Module:
    """The model that all weights are read into."""
    return vit_of({})


@pytest.fixture(scope="module")
def weights(vit, tmp_path_factory) -> dict[str, Any]:
    """The contents of a file of each kind, in small, and a folder."""
    folder = tmp_path_factory.mktemp("weights")
    save_file(vit.state_dict(), folder / "plain.safetensors")
    np.savez(folder / "jax.npz", **jax_release(vit))
    torch.save(vit.state_dict(), folder / "plain.pth")
    torch.save(teacher(vit), folder / "teacher.pth")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())} | {"folder": folder}


@SOME
@given(seed=st.integers(0, 10**9), head=st.booleans())
@pytest.mark.parametrize("name", ["plain.safetensors", "jax.npz", "plain.pth", "teacher.pth"])
def test_weights_with_a_byte_changed_are_finite_numbers_of_this_model_or_one_line(name, seed, head, weights, vit):
    content = weights[name]
    file = weights["folder"] / f"fuzz-{name}"
    # The first bytes say where everything is: half of the changes are there.
    start, end = (content[:400], content[400:]) if head else (b"", content)
    file.write_bytes(flipped(start, seed) + end if head else flipped(end, seed))
    model = answer(load_weights, vit, file)
    if isinstance(model, torch.nn.Module):
        assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


@FEW
@given(
    name=st.text(max_size=12)
    | st.sampled_from(["x" * 5000, "../..", "hf-hub:a/b", "vit_base*", "local-dir:/tmp", "\n"])
)
def test_any_name_of_a_backbone_gives_a_model_or_one_line(name):
    answer(lambda: meta_backbone(BackboneSettings(name=name[:255], pretrained=False)))
