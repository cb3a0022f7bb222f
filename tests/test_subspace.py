"""The paper's linear algebra, against a dense SVD in float64 written from its formulas."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from inflora import subspace
from inflora.subspace import Memory, complement, energy_inside, free_basis, taken_count, threshold

WIDTH = 12


def inputs_of(seed: int, width: int = WIDTH, rank: int | None = None, count: int = 200) -> Tensor:
    """Inputs (N x D) of a made-up layer, with energies that fall off like those of a real one."""
    generator = torch.Generator().manual_seed(seed)
    rank = width if rank is None else rank
    scales = torch.logspace(0, -2, rank, dtype=torch.float64) if rank else torch.zeros(0, dtype=torch.float64)
    coordinates = torch.randn(count, rank, generator=generator, dtype=torch.float64) * scales
    return coordinates @ torch.randn(rank, width, generator=generator, dtype=torch.float64)


def covariance(inputs_ND: Tensor) -> Tensor:
    return inputs_ND.T @ inputs_ND / len(inputs_ND)


def orthonormal(seed: int, columns: int, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, columns, generator=generator, dtype=torch.float64)).Q


def design(cov_DD: Tensor, memory: Memory | None, rank: int) -> Tensor:
    """The design of a single layer."""
    return subspace.design([cov_DD], [memory], rank)[0]


def update(memory: Memory | None, cov_DD: Tensor, threshold: float, **options) -> Memory:
    """The memory of a single layer."""
    return subspace.update([memory], [cov_DD], threshold, **options)[0]


def taken(memory: Memory) -> Tensor:
    """Projector (D x D) onto what old tasks use, whichever way the memory says it."""
    basis_DK = memory.basis_DK.double()
    projector = basis_DK @ basis_DK.T
    return projector if memory.kind == "remove" else torch.eye(len(projector), dtype=torch.float64) - projector


def updated(memory: Memory | None, seeds: range, energy: float = 0.98, **options) -> Memory:
    """The memory after one made-up task for each seed."""
    for seed in seeds:
        memory = update(memory, covariance(inputs_of(seed)), energy, **options)
    assert memory is not None
    return memory


REMOVE = Memory("remove", orthonormal(1, 5).float())
RETAIN = Memory("retain", orthonormal(2, 5).float())
MEMORIES = pytest.mark.parametrize("memory", [REMOVE, RETAIN], ids=lambda memory: memory.kind)
ENERGIES = pytest.mark.parametrize("energy_of", ["covariance", "inputs"])


# The design of A.


def reference_design(cov_DD: Tensor, memory: Memory | None, rank: int) -> Tensor:
    """A^T A from the leading left singular vectors of the projected covariance, as the formula stands."""
    projected = cov_DD if memory is None else cov_DD - taken(memory) @ cov_DD
    leading = torch.linalg.svd(projected).U[:, :rank]
    return leading @ leading.T / 3


@given(seed=st.integers(0, 999), rank=st.integers(1, 4), memory=st.sampled_from([None, REMOVE, RETAIN]))
def test_the_rows_of_A_are_the_leading_left_singular_vectors_of_what_old_tasks_leave(seed, rank, memory):
    cov_DD = covariance(inputs_of(seed))
    lora_A = design(cov_DD, memory, rank).double()
    torch.testing.assert_close(lora_A.T @ lora_A, reference_design(cov_DD, memory, rank), atol=1e-5, rtol=0)


@MEMORIES
@pytest.mark.parametrize("rank_of_inputs", [WIDTH, 3, 1, 0])
@pytest.mark.parametrize("rank", [1, 4, WIDTH])
def test_the_rows_of_A_are_orthogonal_to_the_old_memory(memory, rank_of_inputs, rank):
    lora_A = design(covariance(inputs_of(3, rank=rank_of_inputs)), memory, rank).double()
    assert len(lora_A) > 0
    assert (lora_A @ taken(memory)).abs().max() < 1e-5


@MEMORIES
@pytest.mark.parametrize("rank_of_inputs", [WIDTH, 3, 0])
def test_the_rows_of_A_are_orthogonal_and_of_length_one_over_root_three(memory, rank_of_inputs):
    lora_A = design(covariance(inputs_of(3, rank=rank_of_inputs)), memory, 4).double()
    torch.testing.assert_close(lora_A @ lora_A.T, torch.eye(4, dtype=torch.float64) / 3, atol=1e-6, rtol=0)


@MEMORIES
def test_a_rank_above_the_free_dimension_gives_a_row_per_free_direction(memory):
    free = free_basis(memory, WIDTH).shape[1]
    assert design(covariance(inputs_of(3)), memory, WIDTH).shape == (free, WIDTH)


@pytest.mark.parametrize(
    "memory", [Memory("remove", torch.eye(WIDTH)), Memory("retain", torch.zeros(WIDTH, 0))], ids=lambda m: m.kind
)
def test_when_nothing_is_free_A_has_no_rows_and_the_memory_stays_full(memory):
    cov_DD = covariance(inputs_of(3))
    assert design(cov_DD, memory, 4).shape == (0, WIDTH)
    torch.testing.assert_close(taken(update(memory, cov_DD, 0.99)), torch.eye(WIDTH, dtype=torch.float64))


# The memory.


def reference_update(memory: Memory | None, inputs_ND: Tensor, eps: float, energy_of: str) -> tuple[Tensor, int, float]:
    """The taken directions' projector and number after a task (algorithm.md, after task t, steps 2 to 4).

    The third value is how near to the threshold the energy came: which side it falls on is then a matter of rounding.
    """
    data = inputs_ND.T / len(inputs_ND) ** 0.5  # D x N: its singular values are those of the inputs
    matrix = data @ data.T if energy_of == "covariance" else data
    total = torch.linalg.svdvals(matrix).square().sum()
    if memory is None:
        U, S, _ = torch.linalg.svd(matrix, full_matrices=False)
        reached = (S.square() / total).cumsum(0)
        number, met = max(1, int((reached < eps).sum())), reached - eps
        basis = U[:, :number]
        return basis @ basis.T, number, float(met.abs().min())
    old = taken(memory)
    U, S, _ = torch.linalg.svd(matrix - old @ matrix, full_matrices=False)
    shares = S.square() / total
    if memory.kind == "remove":
        held = 1 - float(shares.sum())
        margins, number = [abs(held - eps)], 0
        while held < eps:
            held, number = held + float(shares[number]), number + 1
            margins.append(abs(held - eps))
    else:
        left = float(shares.sum())
        margins, number = [abs(left - (1 - eps))], 0
        while left >= 1 - eps:
            left, number = left - float(shares[number]), number + 1
            margins.append(abs(left - (1 - eps)))
    new = U[:, :number]
    return old + new @ new.T, round(float(old.trace())) + number, min(margins)


@ENERGIES
@given(
    seed=st.integers(0, 999),
    memory=st.sampled_from([None, REMOVE, RETAIN]),
    eps=st.floats(0.3, 0.9999),
    may_flip=st.booleans(),
)
def test_the_memory_after_a_task_is_that_of_the_formulas(energy_of, seed, memory, eps, may_flip):
    inputs_ND = inputs_of(seed)
    projector, number, margin = reference_update(memory, inputs_ND, eps, energy_of)
    assume(margin > 1e-6)
    after = update(memory, covariance(inputs_ND), eps, energy_of=energy_of, may_flip=may_flip)
    assert round(float(taken(after).trace())) == number
    torch.testing.assert_close(taken(after), projector, atol=1e-5, rtol=0)


@given(seeds=st.lists(st.integers(0, 999), min_size=1, max_size=12), energy=st.floats(0.5, 0.9999))
def test_dualgpm_and_gpm_remember_the_same_directions_at_every_task(seeds, energy):
    dual = plain = None
    for task, seed in enumerate(seeds):
        cov_DD, share = covariance(inputs_of(seed)), threshold(task, len(seeds), energy, 1.0)
        dual, plain = update(dual, cov_DD, share), update(plain, cov_DD, share, may_flip=False)
        torch.testing.assert_close(taken(dual), taken(plain), atol=1e-4, rtol=0)
        assert plain.kind == "remove"


def test_the_memory_turns_into_its_complement_once_more_than_half_the_width_is_taken():
    memories = [updated(None, range(tasks), energy=0.7) for tasks in range(1, 9)]
    numbers = [round(float(taken(memory).trace())) for memory in memories]
    assert [memory.kind for memory in memories] == ["retain" if 2 * n > WIDTH else "remove" for n in numbers]
    assert {memory.kind for memory in memories} == {"remove", "retain"}
    assert all(2 * memory.basis_DK.shape[1] <= WIDTH for memory in memories)


def spectrum(*energies: float) -> Tensor:
    """A covariance with these singular values' shares of energy along the axes."""
    return torch.diag(torch.tensor(energies, dtype=torch.float64).sqrt())


def test_exactly_half_the_width_is_still_remembered_as_it_is():
    memory = update(None, spectrum(0.4, 0.3, 0.2, 0.1), 0.75)
    assert (memory.kind, memory.basis_DK.shape[1]) == ("remove", 2)


def test_the_first_task_leaves_the_direction_out_that_crosses_the_threshold():
    memory = update(None, spectrum(0.5, 0.3, 0.15, 0.05, 0, 0), 0.9)
    torch.testing.assert_close(taken(memory), torch.diag(torch.tensor([1.0, 1, 0, 0, 0, 0])).double())


def test_the_first_task_takes_one_direction_even_where_that_one_crosses_the_threshold():
    memory = update(None, spectrum(0.9, 0.1, 0, 0), 0.5)
    torch.testing.assert_close(taken(memory), torch.diag(torch.tensor([1.0, 0, 0, 0])).double())


@pytest.mark.parametrize("kind", ["remove", "retain"])
def test_later_tasks_take_the_direction_in_that_crosses_the_threshold(kind):
    axes = torch.eye(6)
    memory = Memory("remove", axes[:, 5:]) if kind == "remove" else Memory("retain", axes[:, :5])
    after = update(memory, spectrum(0.5, 0.3, 0.15, 0.05, 0, 0), 0.9)
    torch.testing.assert_close(taken(after), torch.diag(torch.tensor([1.0, 1, 1, 0, 0, 1])).double())


@pytest.mark.parametrize("kind", ["remove", "retain"])
def test_a_later_task_that_the_memory_already_covers_takes_nothing(kind):
    axes = torch.eye(4)
    memory = Memory("remove", axes[:, :2]) if kind == "remove" else Memory("retain", axes[:, 2:])
    assert taken(update(memory, spectrum(0.6, 0.35, 0.05, 0), 0.9)).trace() == pytest.approx(2)


def test_a_first_task_that_takes_more_than_half_the_width_is_remembered_by_its_complement():
    memory = update(None, spectrum(0.4, 0.3, 0.2, 0.1), 0.95)
    assert (memory.kind, memory.basis_DK.shape[1]) == ("retain", 1)
    torch.testing.assert_close(taken(memory), torch.diag(torch.tensor([1.0, 1, 1, 0])).double())


def test_the_two_measures_of_energy_differ():
    cov_DD = covariance(inputs_of(4))
    few, many = (update(None, cov_DD, 0.95, energy_of=e, may_flip=False) for e in ("covariance", "inputs"))
    assert few.basis_DK.shape[1] < many.basis_DK.shape[1]


@pytest.mark.parametrize("memory", [None, REMOVE, RETAIN])
@ENERGIES
def test_a_task_without_any_input_changes_no_memory(memory, energy_of):
    after = update(memory, torch.zeros(WIDTH, WIDTH), 0.95, energy_of=energy_of)
    before = torch.zeros(WIDTH, WIDTH, dtype=torch.float64) if memory is None else taken(memory)
    torch.testing.assert_close(taken(after), before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("may_flip", [True, False])
def test_a_basis_stays_orthonormal_over_many_updates(may_flip):
    memory = None
    for seed in range(300):
        # One or two inputs a task, each nearly known already: the memory grows slowly and is rewritten each time.
        memory = update(memory, covariance(inputs_of(seed, 64, rank=2, count=8)), 0.5, may_flip=may_flip)
        gram = memory.basis_DK.double().T @ memory.basis_DK.double()
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), atol=1e-5, rtol=0)


@MEMORIES
def test_a_basis_that_has_drifted_is_made_orthonormal_again(memory):
    drifted = memory._replace(basis_DK=memory.basis_DK + 1e-5 * orthonormal(3, 5).float())
    basis_DK = update(drifted, torch.zeros(WIDTH, WIDTH), 0.95).basis_DK.double()
    torch.testing.assert_close(basis_DK.T @ basis_DK, torch.eye(5, dtype=torch.float64), atol=5e-7, rtol=0)


@pytest.mark.parametrize("may_flip", [True, False])
def test_over_fifty_tasks_until_nothing_is_free_the_memory_stays_orthonormal_and_within_its_bound(may_flip):
    width, memory = 96, None
    for task in range(50):
        # Float32 covariances of overlapping tasks, each in a third of the space, at the published schedule.
        cov_DD = covariance(inputs_of(task % 7, width, rank=32)).float()
        lora_A = design(cov_DD, memory, 10).double()
        if memory is not None and len(lora_A):
            assert (lora_A @ taken(memory)).abs().max() < 1e-5
        memory = update(memory, cov_DD, threshold(task, 50, 0.95, 1.0), may_flip=may_flip)
        gram = memory.basis_DK.double().T @ memory.basis_DK.double()
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), atol=1e-5, rtol=0)
        assert not may_flip or 2 * memory.basis_DK.shape[1] <= width
    assert memory is not None and taken_count(memory, width) > width / 2


@ENERGIES
@pytest.mark.parametrize("memory", [REMOVE, RETAIN], ids=lambda memory: memory.kind)
def test_the_energy_inside_is_the_share_of_squared_singular_values_that_the_projection_takes_away(memory, energy_of):
    data = inputs_of(5).T / 200**0.5
    matrix = data @ data.T if energy_of == "covariance" else data
    outside = torch.linalg.svdvals(matrix - taken(memory) @ matrix).square().sum()
    share = 1 - float(outside / torch.linalg.svdvals(matrix).square().sum())
    assert energy_inside(covariance(inputs_of(5)), memory, energy_of) == pytest.approx(share, abs=1e-6)


def test_there_is_no_energy_inside_without_memory_or_without_inputs():
    assert energy_inside(covariance(inputs_of(5)), None) == pytest.approx(0, abs=1e-9)
    assert energy_inside(torch.zeros(WIDTH, WIDTH), REMOVE) == 0


@pytest.mark.parametrize(("memory", "count"), [(None, 0), (REMOVE, 5), (RETAIN, WIDTH - 5)])
def test_both_kinds_of_memory_count_the_directions_taken(memory, count):
    assert taken_count(memory, WIDTH) == count


def test_what_one_task_has_taken_stays_taken():
    before, after = updated(None, range(2)), updated(None, range(5))
    torch.testing.assert_close(taken(after) @ taken(before), taken(before), atol=1e-5, rtol=0)


@MEMORIES
def test_the_free_basis_is_orthonormal_and_orthogonal_to_the_taken_directions(memory):
    free_DF = free_basis(memory, WIDTH)
    torch.testing.assert_close(free_DF @ free_DF.T + taken(memory), torch.eye(WIDTH).double(), atol=1e-6, rtol=0)


def test_without_memory_every_direction_is_free():
    assert torch.equal(free_basis(None, 4), torch.eye(4, dtype=torch.float64))


@given(columns=st.integers(0, WIDTH), seed=st.integers(0, 99))
def test_a_basis_and_its_complement_make_up_the_whole_space(columns, seed):
    basis_DK = orthonormal(seed, columns)
    both = torch.cat([basis_DK, complement(basis_DK)], dim=1)
    torch.testing.assert_close(both.T @ both, torch.eye(WIDTH, dtype=torch.float64))


# Wide layers: their leading directions come from products, as a whole decomposition gives them.

WIDE = 400
MIXED: list[Memory | None] = [
    None,
    Memory("remove", orthonormal(1, 30, WIDE).float()),
    Memory("retain", orthonormal(2, 180, WIDE).float()),
    REMOVE,
]


def mixed_covariances(seed: int, rank: int = WIDE) -> list[Tensor]:
    """Of three wide layers, with energies that fall as a power, and of a narrow one."""
    spectrum_D = torch.arange(1, WIDE + 1, dtype=torch.float64) ** -1.5 * (torch.arange(WIDE) < rank)
    bases = [orthonormal(seed + layer, WIDE, WIDE) for layer in range(3)]
    return [*((basis_DD * spectrum_D) @ basis_DD.T for basis_DD in bases), covariance(inputs_of(seed))]


@pytest.fixture
def by_products(monkeypatch):
    """What each call found for the layers, None where it left one to a whole decomposition."""
    calls, real = [], subspace._by_products

    def watched(layers):
        calls.append(real(layers))
        return calls[-1]

    monkeypatch.setattr(subspace, "_by_products", watched)
    return calls


def whole(function, *args, **options):
    """The same with whole decompositions only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subspace, "_by_products", lambda layers: [None] * len(layers))
        return function(*args, **options)


@pytest.mark.parametrize("rank", [1, 10, 16])
def test_wide_layers_are_designed_as_by_a_whole_decomposition(rank, by_products):
    designed = subspace.design(mixed_covariances(0), MIXED, rank)
    for ours, theirs in zip(designed, whole(subspace.design, mixed_covariances(0), MIXED, rank), strict=True):
        torch.testing.assert_close(ours.T @ ours, theirs.T @ theirs, atol=1e-7, rtol=0)
    assert [len(found) for found in by_products] == [3]
    assert all(directions is not None for directions in by_products[0])


@ENERGIES
@pytest.mark.parametrize("may_flip", [True, False])
@pytest.mark.parametrize("eps", [0.3, 0.9, 0.99, 0.9999, 1.0])
def test_wide_layers_remember_what_a_whole_decomposition_would(energy_of, may_flip, eps):
    options = {"energy_of": energy_of, "may_flip": may_flip}
    updated = subspace.update(MIXED, mixed_covariances(1), eps, **options)
    for ours, theirs in zip(updated, whole(subspace.update, MIXED, mixed_covariances(1), eps, **options), strict=True):
        assert (ours.kind, ours.basis_DK.shape) == (theirs.kind, theirs.basis_DK.shape)
        torch.testing.assert_close(taken(ours), taken(theirs), atol=1e-6, rtol=0)


@pytest.mark.parametrize("eps", [0.9, 0.99])
def test_a_wide_layer_takes_few_directions_without_a_whole_decomposition(eps, by_products):
    subspace.update(MIXED, mixed_covariances(1), eps)
    assert all(directions is not None for directions in by_products[0])


@pytest.mark.parametrize("rank_of_inputs", [0, 1, 8])
def test_wide_layers_have_rows_for_free_directions_that_no_input_uses(rank_of_inputs):
    for lora_A, memory in zip(subspace.design(mixed_covariances(2, rank_of_inputs), MIXED, 7), MIXED, strict=True):
        rows_RD = lora_A.double()
        torch.testing.assert_close(rows_RD @ rows_RD.T, torch.eye(len(rows_RD)).double() / 3, atol=1e-6, rtol=0)
        assert len(rows_RD) == 7 if memory is not REMOVE else len(rows_RD) <= 7
        assert memory is None or (rows_RD @ taken(memory)).abs().max() < 1e-6


@ENERGIES
def test_a_sum_of_energies_at_the_threshold_is_judged_by_the_whole_decomposition(energy_of, by_products):
    # Two directions hold three quarters: rounding says whether that is the threshold or less.
    energies = torch.zeros(WIDE, dtype=torch.float64)
    energies[:3] = torch.tensor([0.5, 0.25, 0.25])
    basis_DD = orthonormal(0, WIDE, WIDE)
    matrix_DD = (basis_DD * (energies.sqrt() if energy_of == "covariance" else energies)) @ basis_DD.T
    subspace.update([None], [matrix_DD], 0.75, energy_of=energy_of)
    assert by_products == [[None]]


def test_wide_rows_are_orthogonal_to_the_old_memory_however_much_more_energy_that_has(by_products):
    memory = MIXED[1]
    (cov_DD, *_), old_DK = mixed_covariances(4), torch.linalg.qr(memory.basis_DK.double()).Q
    (lora_A,) = subspace.design([cov_DD + 1e12 * old_DK @ old_DK.T], [memory], 5)
    assert by_products[0][0] is not None
    assert (lora_A.double() @ old_DK).abs().max() < 1e-7


def test_wide_layers_give_the_same_bits_again():
    for once, again in zip(*(subspace.design(mixed_covariances(3), MIXED, 10) for _ in range(2)), strict=True):
        assert torch.equal(once, again)


# The threshold.


def test_the_threshold_rises_evenly_and_would_arrive_after_the_last_task():
    assert threshold(0, 10, 0.95, 1.0) == 0.95
    assert threshold(9, 10, 0.95, 1.0) == pytest.approx(0.995)
    assert threshold(10, 10, 0.95, 1.0) == 1.0


def test_a_stream_cut_short_keeps_the_thresholds_of_the_whole_one():
    assert threshold(2, 20, 0.9, 1.0) < threshold(2, 5, 0.9, 1.0)
