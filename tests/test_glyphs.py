"""The shipped backbone: letters only, the same weights for the same seed, and a file that says what made it."""

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from docs import glyphs
from docs.glyphs import HELD_OUT_FONTS, classes, font_paths
from inflora.backbone import build_backbone
from inflora.config import BackboneSettings

SHIPPED = Path(str(files("inflora") / "weights" / "glyph_vit.safetensors"))


def by_command(out: Path) -> dict[str, torch.Tensor]:
    command = [sys.executable, glyphs.__file__, "--seed", "3", "--epochs", "1", "--steps", "2", "--batch", "8"]
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
    return load_file(out)


def here(out: Path) -> dict[str, torch.Tensor]:
    """In this process, whatever it has drawn before."""
    glyphs.main(out, seed=3, epochs=1, steps=2, batch=8)
    return load_file(out)


def test_no_digit_is_among_the_letters():
    letters = "".join(classes())
    assert len(letters) > 100
    assert not any(letter.isdigit() for letter in letters)


def test_some_fonts_are_never_trained_on():
    assert set(HELD_OUT_FONTS) < set(font_paths())


@pytest.mark.e2e
def test_the_same_seed_gives_the_same_weights_bit_for_bit(tmp_path):
    first, second = by_command(tmp_path / "a.safetensors"), here(tmp_path / "b.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_shipped_file_is_small_and_says_what_made_it():
    assert SHIPPED.stat().st_size < 4_000_000
    with safe_open(SHIPPED, "pt") as file:
        metadata = file.metadata()
    assert metadata["command"].startswith("python docs/glyphs.py --seed 0")
    assert {"torch", "timm", "matplotlib", "PIL", "held_out_accuracy"} <= set(metadata)


def test_the_shipped_file_is_the_default_backbone():
    vit = build_backbone(BackboneSettings())
    assert sum(parameter.numel() for parameter in vit.parameters()) < 1_300_000
