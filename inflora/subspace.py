"""The paper's linear algebra: where a new adapter may live, and what the old tasks have taken.

Shapes: D width, R rank, K basis vectors, F free directions (those no old task uses).

Everything is said with one matrix. With ``free`` (D x F) an orthonormal basis of the directions that are still free and
``gram`` the second moment whose eigenvalues are the energies, the part that old tasks do not use is
``free^T gram free`` (F x F). Its leading eigenvectors, mapped back by ``free``, are the leading left singular vectors
of the paper's projected matrix, and they lie in the free space by construction, also when it is rank deficient.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Energy = Literal["covariance", "inputs"]


class Memory(NamedTuple):
    """The subspace that old tasks use, or its complement.

    ``kind`` "remove": the columns of ``basis_DK`` span what is taken; "retain": what is still free.
    """

    kind: Literal["remove", "retain"]
    basis_DK: Tensor


def threshold(task: int, total_tasks: int, start: float, end: float) -> float:
    """Share of energy that the memory must hold after ``task`` (from 0): eps_t of DualGPM's schedule."""
    return start + (end - start) * task / total_tasks


def free_basis(memory: Memory | None, width: int) -> Tensor:
    """Orthonormal basis (D x F, float64) of the directions that the old tasks leave free."""
    if memory is None:
        return torch.eye(width, dtype=torch.float64)
    basis_DK = memory.basis_DK.double()
    return basis_DK if memory.kind == "retain" else complement(basis_DK)


def complement(basis_DK: Tensor) -> Tensor:
    """Orthonormal basis (D x D-K) of what is orthogonal to ``basis_DK``'s columns."""
    return torch.linalg.qr(basis_DK, mode="complete").Q[:, basis_DK.shape[1] :]


def design(cov_DD: Tensor, memory: Memory | None, rank: int) -> Tensor:
    """The fixed down-projection A_t (R x D, float32) of a new task: paper, equations 8 and 9.

    Its rows are the leading directions of the new task's inputs with the old tasks' part removed, divided by sqrt(3),
    which gives them the expected norm of LoRA's usual initialisation. Fewer than ``rank`` rows come back when fewer
    directions are free.
    """
    free_DF = free_basis(memory, cov_DD.shape[0]).to(cov_DD.device)
    _, directions_DF = _energies(cov_DD, free_DF, "covariance")
    return (directions_DF[:, :rank].T / 3**0.5).float().contiguous()


def update(
    memory: Memory | None,
    cov_DD: Tensor,
    threshold: float,
    *,
    energy_of: Energy = "covariance",
    may_flip: bool = True,
) -> Memory:
    """DualGPM: the memory after a task whose inputs have the uncentred covariance ``cov_DD``.

    ``energy_of`` "covariance" measures energy on the squared singular values of the covariance, as the authors'
    experiments do; "inputs" on those of the inputs themselves, as the paper writes. ``may_flip`` False is GPM: always
    the taken directions, never their complement.
    """
    width = cov_DD.shape[0]
    free_DF = free_basis(memory, width).to(cov_DD.device)
    energies_F, directions_DF = _energies(cov_DD, free_DF, energy_of)
    total = _total(cov_DD, energy_of)
    number = _count(energies_F, total, threshold, memory)
    if memory is not None and memory.kind == "retain":
        return Memory("retain", _orthonormal(directions_DF[:, number:]).float())
    if may_flip and 2 * (width - free_DF.shape[1] + number) > width:
        return Memory("retain", _orthonormal(directions_DF[:, number:]).float())
    old_DK = free_DF[:, :0] if memory is None else memory.basis_DK.to(free_DF)
    return Memory("remove", _orthonormal(torch.cat([old_DK, directions_DF[:, :number]], dim=1)).float())


def taken_count(memory: Memory | None, width: int) -> int:
    """Number of directions that old tasks use."""
    if memory is None:
        return 0
    columns = memory.basis_DK.shape[1]
    return columns if memory.kind == "remove" else width - columns


def energy_inside(cov_DD: Tensor, memory: Memory | None, energy_of: Energy = "covariance") -> float:
    """Share of the inputs' energy that lies in the directions that old tasks use; 0 when there is no input."""
    total = _total(cov_DD, energy_of)
    if memory is None or total <= 0:
        return 0.0
    # Along whichever directions are stored, which are the fewer ones.
    share = float(_along(cov_DD, memory.basis_DK.to(cov_DD), energy_of).diagonal().sum() / total)
    return share if memory.kind == "remove" else 1 - share


def _along(cov_DD: Tensor, basis_DK: Tensor, energy_of: Energy) -> Tensor:
    """The matrix (K x K, float64) whose trace is the energy along the basis: M^T C M, or M^T C C M."""
    cov_DD, basis_DK = cov_DD.double(), basis_DK.double()
    read_DK = cov_DD @ basis_DK
    return read_DK.T @ (read_DK if energy_of == "covariance" else basis_DK)


def _total(cov_DD: Tensor, energy_of: Energy) -> Tensor:
    """The energy along all directions."""
    cov_DD = cov_DD.double()
    return cov_DD.square().sum() if energy_of == "covariance" else cov_DD.diagonal().sum()


def _energies(cov_DD: Tensor, free_DF: Tensor, energy_of: Energy) -> tuple[Tensor, Tensor]:
    """Energies (F, falling) of the inputs along the free directions, and those directions (D x F)."""
    energies_F, rotation_FF = torch.linalg.eigh(_along(cov_DD, free_DF, energy_of))
    return energies_F.flip(0).clamp_min(0), free_DF @ rotation_FF.flip(1)


def _count(energies_F: Tensor, total: Tensor, threshold: float, memory: Memory | None) -> int:
    """How many leading free directions the finished task claims (algorithm.md, after task t, steps 2 to 4)."""
    if total <= 0 or not len(energies_F):
        return 0
    shares_F = energies_F / total
    if memory is None:
        # The direction that crosses the threshold is left out in the first task, and taken in later: as published.
        return max(1, int((shares_F.cumsum(0) < threshold).sum()))
    unclaimed_F = shares_F.sum() - shares_F.cumsum(0) + shares_F
    if memory.kind == "remove":
        return int((1 - unclaimed_F < threshold).sum())
    return int((unclaimed_F >= 1 - threshold).sum())


def _orthonormal(basis_DK: Tensor) -> Tensor:
    """The same columns, made orthonormal again where rounding has let them drift."""
    return torch.linalg.qr(basis_DK).Q
