"""Each task's update, written as a LoRA adapter that the PEFT library loads."""

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel
from safetensors.torch import save
from torch import Tensor, nn

from inflora.files import write_atomically
from inflora.lora import LoRALinear, adapted_layers


class AdapterConfig(BaseModel):
    """PEFT's ``adapter_config.json``."""

    peft_type: str = "LORA"
    task_type: str | None = None
    base_model_name_or_path: str
    inference_mode: bool = True
    r: int
    lora_alpha: int
    lora_dropout: float = 0.0
    bias: str = "none"
    fan_in_fan_out: bool = False
    target_modules: list[str]


def save_adapter(folder: Path, backbone: nn.Module, factors: Mapping[str, Tensor], base: str) -> None:
    """Write one task's ``<layer>.lora_A`` and ``<layer>.lora_B`` as ``adapter_model.safetensors`` and its config.

    PEFT adapts a linear layer whole: B gets rows of zeros for outputs that are not adapted (the queries of a fused
    ``qkv``). Layers of a lower rank than the others are filled up with zeros. The scale is 1.

    Args:
        folder: Is made where it is missing.
        backbone: The model that was adapted, with the layers' names as in ``factors`` (after ``backbone.``).
        factors: As an adapter's ``end_task`` gives them.
        base: The backbone's name, as a note.
    """
    layers = {name: layer for name, layer in adapted_layers(backbone) if f"backbone.{name}.lora_A" in factors}
    rank = max(1, *(len(factors[f"backbone.{name}.lora_A"]) for name in layers))
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        lora_A, lora_B = (factors[f"backbone.{name}.{factor}"].cpu() for factor in ("lora_A", "lora_B"))
        missing = rank - len(lora_A)
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = nn.functional.pad(lora_A, (0, 0, 0, missing))
        tensors[f"{prefix}.lora_B.weight"] = nn.functional.pad(_on_all_outputs(layer, lora_B), (0, missing))
    config = AdapterConfig(base_model_name_or_path=base, r=rank, lora_alpha=rank, target_modules=sorted(layers))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "adapter_model.safetensors", save(tensors))
    write_atomically(folder / "adapter_config.json", config.model_dump_json(indent=2).encode())


def _on_all_outputs(layer: LoRALinear, lora_B: Tensor) -> Tensor:
    """B of the adapted outputs (O x R) as B of all outputs."""
    whole = torch.zeros(layer.out_features, lora_B.shape[1], dtype=lora_B.dtype)
    for rows, part in zip(layer.rows, lora_B.split(layer.sizes), strict=True):
        whole[rows] = part
    return whole
