"""Leading eigenvectors from products, against a dense decomposition: what is found is exact, the rest is left to it."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inflora.eigen import BLOCK, leading

WIDTH, MOST = 200, 128
PLACES = torch.arange(1, WIDTH + 1, dtype=torch.float64)
FALLING = {
    "power": PLACES**-3,
    "beyond a memory": (PLACES + 20) ** -4.0,
    "exponential": torch.exp(-PLACES / 4),
    "one large": torch.cat([torch.tensor([1e5]), PLACES[1:] ** -3]),
    "tiny": 1e-40 * PLACES**-3,
    "pairs": (PLACES // 2 + 1) ** -4.0,
}
NASTY = {
    "flat": torch.ones(WIDTH),
    "nearly flat": 1 + PLACES.flip(0) / 1e4,
    "nothing": torch.zeros(WIDTH),
    "few directions": (PLACES <= 3) / PLACES,
    "repeated": torch.where(PLACES <= 40, 1.0, 0.5**PLACES),
    "repeated, not first": torch.where(PLACES <= 5, 2.0, torch.where(PLACES <= 35, 1.0, PLACES**-3)),
    "nearly repeated": torch.where(PLACES <= 30, 1 - 1e-6 * PLACES, PLACES**-3),
    "a step": torch.where(PLACES <= 10, 1.0, 1e-9),
}


def vectors(seed: int, columns: int = WIDTH) -> Tensor:
    return torch.randn(WIDTH, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(spectrum_D: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """A matrix with these eigenvalues, and its eigenvectors."""
    eigenvectors_DD = torch.linalg.qr(vectors(seed)).Q
    return (eigenvectors_DD * spectrum_D.double()) @ eigenvectors_DD.T, eigenvectors_DD


def found(*matrices_DD: Tensor, numbers: list[int], most: int = MOST) -> list[Tensor | None]:
    def times(matrix_DD: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda vectors_DB: matrix_DD @ vectors_DB

    def always(number: int) -> Callable[[Tensor], Tensor]:
        def wanted(values_S: Tensor) -> Tensor:
            assert values_S.isfinite().all()
            return torch.tensor(number)

        return wanted

    return leading([times(each) for each in matrices_DD], vectors(1000, most), [always(number) for number in numbers])


@settings(max_examples=30)
@given(kind=st.sampled_from(list(FALLING)), number=st.integers(1, 10), seed=st.integers(0, 99))
def test_of_a_falling_spectrum_the_leading_eigenvectors_are_found_exactly(kind, number, seed):
    if kind == "pairs":
        number += number % 2 == 0  # between two pairs
    matrix_DD, eigenvectors_DD = matrix(FALLING[kind], seed)
    (directions_DN,) = found(matrix_DD, numbers=[number])
    assert directions_DN is not None
    inside = eigenvectors_DD[:, :number].T @ directions_DN
    torch.testing.assert_close(inside @ inside.T, torch.eye(number).double(), atol=1e-13, rtol=0)
    torch.testing.assert_close(directions_DN.T @ directions_DN, torch.eye(number).double(), atol=1e-13, rtol=0)
    assert (eigenvectors_DD[:, number:].T @ directions_DN).norm() < 1e-7


@settings(max_examples=60)
@given(kind=st.sampled_from(list(NASTY)), number=st.integers(1, 60), seed=st.integers(0, 99))
def test_what_is_found_has_the_largest_eigenvalues_whatever_the_spectrum(kind, number, seed):
    matrix_DD, _ = matrix(NASTY[kind], seed)
    (directions_DN,) = found(matrix_DD, numbers=[number])
    if directions_DN is not None:
        largest = NASTY[kind].double()[:number]
        torch.testing.assert_close((directions_DN * (matrix_DD @ directions_DN)).sum(0), largest, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("kind", "number"), [("nothing", 1), ("few directions", 4), ("nearly flat", 10), ("repeated", BLOCK + 1)]
)
def test_what_products_cannot_tell_is_left_to_a_dense_solver(kind, number):
    assert found(matrix(NASTY[kind], 0)[0], numbers=[number]) == [None]


def test_a_matrix_with_fewer_directions_than_the_basis_gives_those_it_has():
    # Along the axes, so that rounding leaves nothing at all of the others.
    (directions_DN,) = found(torch.diag(NASTY["few directions"].double()), numbers=[3])
    assert directions_DN is not None
    assert directions_DN[3:].norm() < 1e-12


def test_what_would_take_as_long_as_a_dense_solver_is_given_up_halfway():
    matrix_DD, products = matrix(NASTY["nearly flat"], 0)[0], []

    def times(vectors_DB: Tensor) -> Tensor:
        products.append(vectors_DB.shape[1])
        return matrix_DD @ vectors_DB

    assert leading([times], vectors(1, MOST), [lambda values_S: torch.tensor(MOST // 3)]) == [None]
    assert sum(products) == MOST // 2 + BLOCK


def test_no_more_than_the_basis_may_hold_is_found():
    assert found(matrix(FALLING["power"], 0)[0], numbers=[40], most=32) == [None]


def test_each_matrix_has_its_own_number_and_its_own_end():
    kinds, numbers = ["power", "nearly flat", "exponential", "tiny"], [3, 10, 0, 7]
    spectra = [(FALLING | NASTY)[kind] for kind in kinds]
    matrices = [matrix(spectrum_D, seed) for seed, spectrum_D in enumerate(spectra)]
    several = found(*(each for each, _ in matrices), numbers=numbers)
    assert [None if each is None else each.shape[1] for each in several] == [3, None, 0, 7]
    for (_, eigenvectors_DD), directions_DN in zip(matrices, several, strict=True):
        if directions_DN is not None:
            assert (eigenvectors_DD[:, directions_DN.shape[1] :].T @ directions_DN).norm() < 1e-7


def test_the_same_matrices_give_the_same_bits():
    matrices = [matrix(FALLING[kind], seed)[0] for seed, kind in enumerate(("power", "exponential"))]
    for once, again in zip(found(*matrices, numbers=[5, 9]), found(*matrices, numbers=[5, 9]), strict=True):
        assert once is not None and torch.equal(once, again)
