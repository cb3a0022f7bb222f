"""Memories of old tasks' inputs as they are kept from task to task: saved, and the same on all workers."""

import torch
from torch import Tensor

from inflora.distributed import broadcast
from inflora.subspace import Memory


def memory_of(state: dict[str, Tensor]) -> dict[str, Memory]:
    """Layer name -> memory, from a saved state's ``<layer>.remove`` and ``<layer>.retain``."""
    memory = {}
    for key, basis_DK in state.items():
        name, _, kind = key.rpartition(".")
        if kind in ("remove", "retain"):
            memory[name] = Memory("remove" if kind == "remove" else "retain", basis_DK)
    return memory


def from_first_worker(memory: Memory) -> Memory:
    """The first worker's memory, on the CPU, where it is kept between tasks."""
    retain = broadcast(torch.tensor([memory.kind == "retain"], device=memory.basis_DK.device, dtype=torch.uint8))
    return Memory("retain" if retain else "remove", broadcast(memory.basis_DK).cpu())
