"""What a model's adaptable layers read, summed up while it computes: the covariances of their inputs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from inflora.lora import adapted_layers
from inflora.precision import products


class InputCovariance:
    """Running sums of ``h h^T`` (float64 sums of float32 products) and ``h`` over a layer's inputs, and their number.

    The products are made for the upper triangle only, in strips; ``mirror`` completes the sum.
    """

    STRIP = 256  # narrower ones multiply more slowly than they save

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum_DD = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.sum_D = torch.zeros(width, dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, inputs_BND: Tensor) -> None:
        flat = inputs_BND.detach().flatten(0, -2).float()
        # Layers are watched while the model computes, in whatever precision that is.
        with products("fp32", flat.device):
            for start in range(0, flat.shape[1], self.STRIP):
                end = start + self.STRIP
                self.sum_DD[start:end, start:] += flat[:, start:end].T @ flat[:, start:]
        self.sum_D += flat.sum(0, dtype=torch.float64)
        self.count += len(flat)

    def mirror(self) -> None:
        """Complete the sum when all inputs have been added."""
        self.sum_DD = self.sum_DD.triu() + self.sum_DD.triu(1).T


@contextmanager
def gather_covariance(model: nn.Module) -> Iterator[dict[str, InputCovariance]]:
    """Watch every adaptable layer while the context is open: layer name -> covariance of what it has read.

    The sums are complete when the context is left. A compiled model runs as it is written meanwhile.
    """
    seen: dict[str, InputCovariance] = {}
    hooks = []
    for name, layer in adapted_layers(model):
        seen[name] = InputCovariance(layer.in_features, layer.weight.device)
        hooks.append(layer.register_forward_pre_hook(lambda _, args, to=seen[name]: to.add(args[0])))
    try:
        with torch.compiler.set_stance("force_eager"):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()
        for covariance in seen.values():
            covariance.mirror()
