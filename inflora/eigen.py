"""Leading eigenvectors of many matrices at once, from products and small decompositions, as accelerators like it.

Block Krylov (Musco and Musco, 2015): a few random vectors, what the matrix makes of them, what it makes of that, all
kept orthonormal; within their span the matrix is small, and its leading eigenvectors there are soon its own. A dense
solver needs milliseconds to tenths of a second for each matrix, and little of that is products.

Shapes: L matrices, D wide, S vectors in the basis of each, B new ones in each step.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Matrix = Callable[[Tensor], Tensor]
"""A symmetric positive semidefinite matrix, as its product with vectors (D x B)."""

BLOCK = 16
FIRST_LOOK = 64
ANGLE = 1e-8
"""Largest angle between what is found and what is sought; float32, in which it will be kept, is coarser."""


def leading(
    matrices: Sequence[Matrix], random_DS: Tensor, wanted: Sequence[Callable[[Tensor], Tensor]]
) -> list[Tensor | None]:
    """The leading eigenvectors (D x n) of each matrix, or None where only a dense solver can be trusted with them.

    Args:
        matrices: Each one's products with vectors.
        random_DS: Random vectors to begin with, as many as the basis may have.
        wanted: How many eigenvectors are wanted (a scalar tensor), given the basis's eigenvalues, falling; their own
            number or more says that the basis is too small.
    """
    width, most = random_DS.shape[0], random_DS.shape[1] // BLOCK * BLOCK
    basis_LDS = random_DS.new_zeros(len(matrices), width, most)
    within_LSS = random_DS.new_zeros(len(matrices), most, most)
    outside_LDB, look = _images(matrices, [random_DS[:, :BLOCK]] * len(matrices)), min(FIRST_LOOK, most)
    for size in range(BLOCK, most + 1, BLOCK):
        newest = slice(size - BLOCK, size)
        # And a trace of randomness, where the matrix leads nowhere new.
        scale_L11 = outside_LDB.norm(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(outside_LDB.dtype).tiny)
        new_LDB = outside_LDB / scale_L11 + 1e-15 * random_DS[:, newest]
        basis_LDS[..., newest] = _orthonormal(new_LDB, basis_LDS[..., : size - BLOCK])
        known_LDS = basis_LDS[..., :size]
        image_LDB = _images(matrices, known_LDS[..., newest])
        inside_LSB = known_LDS.mT @ image_LDB
        within_LSS[:, newest, :size] = inside_LSB.mT  # of a symmetric matrix eigh reads the lower half
        outside_LDB = image_LDB - known_LDS @ inside_LSB
        if size == look:
            values_LS, vectors_LSS = torch.linalg.eigh(within_LSS[:, :size, :size])
            values_LS, vectors_LSS = values_LS.flip(-1).clamp_min(0), vectors_LSS.flip(-1)
            number_L = torch.stack([number(values_S) for number, values_S in zip(wanted, values_LS, strict=True)])
            # What the matrix makes of an eigenvector within the basis leaves it through the newest vectors only.
            found_L = _found(values_LS, outside_LDB @ vectors_LSS[:, -BLOCK:], number_L)
            # Beside eigh's own check, the one wait for the device.
            numbers, found = torch.stack([number_L, found_L.to(number_L)]).tolist()
            # For many vectors the basis grows so large that a dense solver is no dearer.
            hopeless = [2 * size >= most and 4 * number > most for number in numbers]
            if size == most or all(done or never for done, never in zip(found, hopeless, strict=True)):
                break
            look = min(most, 4 * size // 3 // BLOCK * BLOCK)
    return [
        known_DS @ vectors_SS[:, :number] if done else None
        for known_DS, vectors_SS, number, done in zip(known_LDS, vectors_LSS, numbers, found, strict=True)
    ]


def _images(matrices: Sequence[Matrix], vectors_LDB: Iterable[Tensor]) -> Tensor:
    return torch.stack([matrix(vectors_DB) for matrix, vectors_DB in zip(matrices, vectors_LDB, strict=True)])


def _found(values_LS: Tensor, residual_LDS: Tensor, number_L: Tensor) -> Tensor:
    """Which matrices' leading ``number`` eigenvectors have been found, and exactly enough.

    The residual over the gap to the next eigenvalue bounds the angle (Davis and Kahan). Where there is hardly a gap no
    angle is defined: vectors are then as good as a dense solver's when the residual is down to rounding.
    """
    size, eps = values_LS.shape[1], torch.finfo(values_LS.dtype).eps
    last_L1 = number_L.clamp(1, size - 1)[:, None] - 1
    residual_L1 = residual_LDS.square().sum(-2).cumsum(-1).gather(-1, last_L1).sqrt()
    gap_L1 = (values_LS[:, :-1] - values_LS[:, 1:]).gather(-1, last_L1)
    rounding_L1 = 30 * eps * values_LS.sum(-1, keepdim=True)
    exact_L1 = residual_L1 <= torch.maximum(ANGLE * gap_L1, rounding_L1)
    # Beside eigenvalues that are nothing but rounding, any vector would do, also one that the matrix does not lead to.
    real_L1 = values_LS.gather(-1, last_L1) > 1e-10 * values_LS[:, :1]
    # Of an eigenvalue that repeats, the basis knows no more than BLOCK vectors: there may be more than it shows.
    repeats_LS = values_LS[:, BLOCK - 1 :] > 0.99 * values_LS[:, : 1 - BLOCK]
    hidden_L1 = repeats_LS.cumsum(-1).gather(-1, (last_L1 + 1 - BLOCK).clamp_min(0)) > 0
    hidden_L1 &= last_L1 >= BLOCK - 1
    found_L = (exact_L1 & real_L1 & ~hidden_L1).squeeze(-1) & (number_L < size)
    return found_L | (number_L == 0)


def _orthonormal(vectors_LDB: Tensor, known_LDS: Tensor) -> Tensor:
    """Orthonormal vectors of the same span, less what lies in that of the orthonormal ``known`` ones.

    Shifted Cholesky QR (Fukaya and others, 2020): products and Cholesky factors, whatever the condition; the shift
    carries the first rounds over directions that are hardly there.
    """
    for shift in (1e-13, 1e-13, 0):
        vectors_LDB = vectors_LDB - known_LDS @ (known_LDS.mT @ vectors_LDB)
        gram_LBB = vectors_LDB.mT @ vectors_LDB
        gram_LBB.diagonal(dim1=-2, dim2=-1).add_(shift * gram_LBB.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True))
        factor_LBB = torch.linalg.cholesky_ex(gram_LBB).L
        vectors_LDB = torch.linalg.solve_triangular(factor_LBB.mT, vectors_LDB, upper=True, left=False)
    return vectors_LDB
