"""The paper's linear algebra: where a new adapter may live, and what the old tasks have taken.

Shapes: D width, R rank, K basis vectors, F free directions (those no old task uses), N directions taken by one task.

Everything is said with the part of a layer's covariance that old tasks do not use, C' = (I - M M^T) C or M M^T C
(D x D). The energies are its squared singular values, or the eigenvalues of the inputs' second moment in the free
space; design and update need their leading directions, and of all other energies only the sum, which is a trace.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from inflora import eigen

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


def free_projector(memory: Memory | None, cov_DD: Tensor) -> Tensor | None:
    """Projector (D x D, float32) onto the directions that old tasks leave free, beside ``cov_DD``; None: all are."""
    exact = _exact(memory, cov_DD)
    if exact is None:
        return None
    taken_DD = exact.basis_DK @ exact.basis_DK.T
    return (taken_DD if exact.kind == "retain" else torch.eye(len(taken_DD)).to(taken_DD) - taken_DD).float()


def complement(basis_DK: Tensor) -> Tensor:
    """Orthonormal basis (D x D-K) of what is orthogonal to ``basis_DK``'s columns."""
    return torch.linalg.qr(basis_DK, mode="complete").Q[:, basis_DK.shape[1] :]


def design(covs_DD: Sequence[Tensor], memories: Sequence[Memory | None], rank: int | float) -> list[Tensor]:
    """The fixed down-projection A_t (R x D, float32) of a new task for each layer: paper, equations 8 and 9.

    Its rows are the leading directions of the new task's inputs with the old tasks' part removed, divided by sqrt(3),
    which gives them the expected norm of LoRA's usual initialisation. Fewer than ``rank`` rows come back when fewer
    directions are free. A ``rank`` that is a float is a share: of the free energy, which a layer's rows are to hold.
    """

    def of_rank(energies_B: Tensor, free: Tensor, slack: float) -> Tensor:
        if isinstance(rank, float):
            return 1 + (energies_B.cumsum(0) < (rank + slack) * free).sum()
        return energies_B.new_full((), rank, dtype=torch.int64)

    layers = [
        _Layer(cov_DD.double(), _exact(memory, cov_DD), "covariance", of_rank)
        for cov_DD, memory in zip(covs_DD, memories, strict=True)
    ]
    return [(directions_DR.T / 3**0.5).float().contiguous() for directions_DR in _leading_free(layers)]


def update(
    memories: Sequence[Memory | None],
    covs_DD: Sequence[Tensor],
    threshold: float,
    *,
    energy_of: Energy = "covariance",
    may_flip: bool = True,
) -> list[Memory]:
    """DualGPM: each layer's memory after a task whose inputs have the uncentred covariance ``cov_DD``.

    ``energy_of`` "covariance" measures energy on the squared singular values of the covariance, as the authors'
    experiments do; "inputs" on those of the inputs themselves, as the paper writes. ``may_flip`` False is GPM: always
    the taken directions, never their complement.
    """
    layers = []
    for memory, cov_DD in zip(memories, covs_DD, strict=True):
        wanted = partial(_wanted, memory=memory, total=_total(cov_DD, energy_of), threshold=threshold)
        layers.append(_Layer(cov_DD.double(), _exact(memory, cov_DD), energy_of, wanted))
    taken = zip(layers, _leading_free(layers), strict=True)
    return [_with(layer.memory, directions_DN, may_flip) for layer, directions_DN in taken]


def balanced(lora_A: Tensor, new_DD: Tensor, old_DD: Tensor) -> Tensor:
    """A (R x D) of the update to be merged: new inputs are read nearly as was learnt, old ones nearly as before.

    A layer's weight was W, and W + B A is learnt. Of all weights V, the one nearest to what W gives for old inputs and
    W + B A for new ones, which minimises ``|(V - W) H_old|^2 + |(V - W - B A) H_new|^2``, is W + B A' with

        A' = A new (new + old)^-1,

    where ``new`` = H_new H_new^T and ``old`` = H_old H_old^T are sums of ``h h^T`` (D x D): the less of old inputs lies
    along a direction, the more of the update stays. RegMean (Jin et al., arXiv 2212.09849) merges whole models so.
    """
    new_DD, old_DD = new_DD.double(), old_DD.double()
    # Products are float32: of a direction with less than their rounding nothing is known, and the ridge takes it away.
    ridge = (1e-5 * new_DD.diagonal().mean()).clamp_min(1e-30)
    both_DD = new_DD + old_DD + ridge * torch.eye(len(new_DD)).to(new_DD)
    return torch.linalg.solve(both_DD, new_DD @ lora_A.double().T).T.to(lora_A)


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
    basis_DK = memory.basis_DK.to(cov_DD.device, torch.float64)
    read_DK = cov_DD.double() @ basis_DK
    share = float((read_DK * (read_DK if energy_of == "covariance" else basis_DK)).sum() / total)
    return share if memory.kind == "remove" else 1 - share


def _total(cov_DD: Tensor, energy_of: Energy) -> Tensor:
    """The energy along all directions."""
    cov_DD = cov_DD.double()
    return cov_DD.square().sum() if energy_of == "covariance" else cov_DD.diagonal().sum()


def _exact(memory: Memory | None, cov_DD: Tensor) -> Memory | None:
    """The memory in float64 beside ``cov_DD``, orthonormal again where rounding has let it drift."""
    if memory is None:
        return None
    basis_DK = memory.basis_DK.to(cov_DD.device, torch.float64)
    # A step of Newton's iteration for the nearest orthonormal columns: it squares an error that was float32's rounding.
    return Memory(memory.kind, 1.5 * basis_DK - 0.5 * basis_DK @ (basis_DK.T @ basis_DK))


def _with(memory: Memory | None, new_DN: Tensor, may_flip: bool) -> Memory:
    """The memory that has taken the orthonormal free directions ``new_DN`` in as DualGPM does."""
    if memory is not None and memory.kind == "retain":
        return _kept("retain", memory.basis_DK @ complement(memory.basis_DK.T @ new_DN))
    taken_DK = new_DN if memory is None else torch.cat([memory.basis_DK, new_DN], dim=1)
    if may_flip and 2 * taken_DK.shape[1] > len(taken_DK):
        return _kept("retain", complement(taken_DK))
    return _kept("remove", taken_DK)


def _kept(kind: Literal["remove", "retain"], basis_DK: Tensor) -> Memory:
    # Laid out as it is when it has been saved and loaded: the order of products, and so their rounding, goes by that.
    return Memory(kind, basis_DK.float().contiguous())


def _wanted(
    energies_B: Tensor, free: Tensor, slack: float, *, memory: Memory | None, total: Tensor, threshold: float
) -> Tensor:
    """Count the leading free directions that the finished task takes: GPM, equation 9, and DualGPM's form of it."""
    threshold, shares_B = threshold + slack, energies_B / total
    if memory is None:
        # The direction that crosses the threshold is left out in the first task, and taken in later: as published.
        number = (shares_B.cumsum(0) < threshold).sum().clamp_min(1)
    else:
        left_B = free / total - shares_B.cumsum(0) + shares_B
        more_B = 1 - left_B < threshold if memory.kind == "remove" else left_B >= 1 - threshold
        number = more_B.sum()
    return torch.where(total > 0, number, 0)


class _Layer(NamedTuple):
    """A question about a layer: the leading directions of its inputs that the old tasks leave free.

    ``wanted`` says how many, given leading energies, the sum of all free ones, and a slack of the threshold.
    """

    cov_DD: Tensor
    memory: Memory | None
    energy_of: Energy
    wanted: Callable[[Tensor, Tensor, float], Tensor]

    def free_part(self, vectors_DN: Tensor) -> Tensor:
        """``vectors_DN`` with the old tasks' part removed: of the covariance's columns, the paper's C'."""
        if self.memory is None:
            return vectors_DN
        kind, basis_DK = self.memory
        inside_DN = basis_DK @ (basis_DK.T @ vectors_DN)
        return inside_DN if kind == "retain" else vectors_DN - inside_DN


def _leading_free(layers: Sequence[_Layer]) -> list[Tensor]:
    """The wanted directions (D x N) of each layer, those of layers of one width together."""
    found: dict[int, Tensor | None] = {}
    of_width: dict[int, list[int]] = {}
    for index, layer in enumerate(layers):
        width = len(layer.cov_DD)
        # Where all is narrow, or little of it free, a dense decomposition is a small one.
        if width >= 384 and 3 * taken_count(layer.memory, width) <= 2 * width:
            of_width.setdefault(width, []).append(index)
    for indices in of_width.values():
        found |= zip(indices, _by_products([layers[index] for index in indices]), strict=True)
    directions = (found.get(index) for index in range(len(layers)))
    return [_dense(layer) if known is None else known for layer, known in zip(layers, directions, strict=True)]


def _dense(layer: _Layer) -> Tensor:
    """The wanted directions from a whole decomposition within the free space, rank deficient or not."""
    free_DF = free_basis(layer.memory, len(layer.cov_DD)).to(layer.cov_DD)
    read_DF = layer.cov_DD @ free_DF
    energies_F, rotation_FF = torch.linalg.eigh(read_DF.T @ (read_DF if layer.energy_of == "covariance" else free_DF))
    energies_F = energies_F.flip(0).clamp_min(0)
    number = int(layer.wanted(energies_F, energies_F.sum(), 0.0))
    return free_DF @ rotation_FF.flip(1)[:, :number]


def _by_products(layers: Sequence[_Layer]) -> list[Tensor | None]:
    """The wanted directions of layers of one width, None where a whole decomposition has to find them."""
    width, device = len(layers[0].cov_DD), layers[0].cov_DD.device
    random = torch.randn(width, min(width // 3, 384), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrices, wanted = zip(*map(_as_products, layers), strict=True)
    found = eigen.leading(matrices, random.to(device), wanted)
    # Once more, for what rounding has brought back.
    return [None if vectors is None else layer.free_part(vectors) for layer, vectors in zip(layers, found, strict=True)]


def _as_products(layer: _Layer) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The matrix whose eigenvalues are the free energies, as its product with vectors; and how many are wanted."""
    free_DD = layer.free_part(layer.cov_DD)
    if layer.energy_of == "covariance":
        free = free_DD.square().sum()
    else:
        free_DD = layer.free_part(free_DD.T)
        free = free_DD.trace()

    def multiply(vectors_DB: Tensor) -> Tensor:
        return free_DD @ (free_DD.T @ vectors_DB if layer.energy_of == "covariance" else vectors_DB)

    def wanted(energies_B: Tensor) -> Tensor:
        fewest, most = (layer.wanted(energies_B, free, slack) for slack in (-1e-10, 1e-10))
        # A sum that meets the threshold within rounding is for the whole decomposition to judge.
        return torch.where(fewest == most, most, len(energies_B))

    return multiply, wanted
