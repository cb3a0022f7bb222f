"""In which precision matrix products are taken, while a context is open."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch

from inflora.config import ConfigError, Precision

BITS: dict[Precision, int] = {"fp32": 32, "tf32": 19, "bf16": 16}
"""``precision/bits``: of a factor of a product, its sign and exponent included."""

BF16_WIDTH = 192
"""From this width on bf16 pays on CPUs that have it (docs/performance.md); narrower models lose more to casts."""


@contextmanager
def products(precision: Precision, device: torch.device) -> Iterator[None]:
    """Take a model's products in ``precision``; weights and what is learnt are float32 in any case.

    One context may be opened inside another: what must be exact is taken in "fp32" while a model runs in bfloat16.
    """
    # Off for float32, which is no type that a CPU casts to.
    with float32_products(precision), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        yield


@contextmanager
def float32_products(precision: Precision) -> Iterator[None]:
    """Take products and convolutions of float32 tensors as they are, or in TensorFloat-32 where that is asked for.

    Left to itself PyTorch takes convolutions in TensorFloat-32, and products not. This is all that a backward pass
    needs: it takes each product in the type that the forward has cast to.
    """
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        yield
    finally:
        for kind, was in zip(kinds, before, strict=True):
            kind.fp32_precision = was


def pick_precision(name: str, device: torch.device, width: int) -> Precision:
    """Resolve ``config.precision``; "auto" is bfloat16 where the device is faster in it.

    Raises:
        ConfigError: The device does not have what is asked for.
    """
    if device.type == "cuda":
        has_bf16 = pays = torch.cuda.is_bf16_supported(including_emulation=False)
        has_tf32 = torch.cuda.get_device_capability(device) >= (8, 0)
        where = torch.cuda.get_device_name(device)
    else:
        # PyTorch 2.9 cannot tell: auto is fp32 there.
        found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        has_bf16, has_tf32 = True, False  # every CPU computes bfloat16, if slowly
        pays = width >= BF16_WIDTH and bool(found.get("avx512_bf16") or found.get("amx_bf16"))
        where = "a CPU"
    known: dict[str, bool] = {"auto": True, "fp32": True, "tf32": has_tf32, "bf16": has_bf16}
    if not known[name]:
        raise ConfigError(
            f"precision must be one of {', '.join(p for p, has in known.items() if has)} on {where}, got {name}"
        )
    if name == "auto":
        return "bf16" if pays else "fp32"
    return cast(Precision, name)
