"""The few collective operations that a run needs; each does nothing when there is one process."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that share the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's place among them, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def all_sum(tensor: Tensor) -> Tensor:
    """``tensor`` summed over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_true(condition: bool) -> bool:
    """True where the condition holds in every process."""
    if world_size() == 1:
        return condition
    # NCCL knows tensors on GPUs only.
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return int(all_sum(torch.tensor(int(condition), device=device))) == world_size()


def broadcast(tensor: Tensor) -> Tensor:
    """The first process's ``tensor`` in all of them; the others' may have other sizes, but as many dimensions.

    What decides the subspace of an adapter goes through here: on unlike devices the same decomposition may differ in
    its signs, or in how many directions it takes.
    """
    if world_size() == 1:
        return tensor
    sizes = torch.tensor(tensor.shape, device=tensor.device)
    dist.broadcast(sizes, 0)
    received = tensor.contiguous() if rank() == 0 else tensor.new_empty(sizes.tolist())
    if received.numel():
        dist.broadcast(received, 0)
    return received


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum the gradients over all processes, in one message.

    Each process scales its loss by its share of the global batch, so the sum is the gradient of the global mean
    whatever the shares are; only what is trained travels, never the frozen backbone.
    """
    if world_size() == 1:
        return
    parameters = list(parameters)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    all_sum(flat)
    for parameter, summed in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = summed.view_as(parameter)
