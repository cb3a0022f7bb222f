"""Metrics against matrices worked out by hand; the definitions are those of the module's docstrings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inflora.metrics import (
    ALIASES,
    TaskCounts,
    accuracy_matrix,
    backward_transfer,
    forgetting,
    forward_transfer,
    metrics_after,
)

MATRIX = [
    [0.9],
    [0.6, 0.8],
    [0.7, 0.5, 1.0],
]


def counts(images: int, correct: int, correct_in_task: int = 0, right_task: int = 0) -> TaskCounts:
    return TaskCounts(images=images, correct=correct, correct_in_task=correct_in_task, right_task=right_task)


# Three tasks of 10, 30 and 10 test images.
EVALUATIONS = (
    (counts(10, 9, 9, 10),),
    (counts(10, 6, 8, 7), counts(30, 24, 27, 25)),
    (counts(10, 7, 8, 9), counts(30, 15, 21, 18), counts(10, 10, 10, 10)),
)


def test_row_i_of_the_matrix_holds_the_accuracy_on_every_task_seen_by_then():
    assert accuracy_matrix(EVALUATIONS) == MATRIX


def test_forgetting_is_the_mean_drop_from_the_best_accuracy_before_the_last_task():
    assert forgetting(MATRIX) == pytest.approx(((0.9 - 0.7) + (0.8 - 0.5)) / 2)


def test_forgetting_looks_for_the_best_accuracy_at_any_earlier_task():
    assert forgetting([[0.2], [0.8, 0.5], [0.5, 0.5, 0.5]]) == pytest.approx((0.3 + 0.0) / 2)


def test_forgetting_is_negative_where_later_tasks_help():
    assert forgetting([[0.2], [0.5, 1.0]]) == pytest.approx(-0.3)


def test_backward_transfer_is_the_mean_change_since_each_task_was_learnt():
    assert backward_transfer(MATRIX) == pytest.approx(((0.7 - 0.9) + (0.5 - 0.8)) / 2)


def test_one_task_forgets_nothing():
    assert (forgetting([[0.3]]), backward_transfer([[0.3]])) == (0.0, 0.0)


def test_after_a_task_that_is_not_the_last_only_the_tasks_own_metrics_are_known():
    assert metrics_after(EVALUATIONS[:2], 3) == pytest.approx(
        {
            "acc/seen": 30 / 40,
            "acc/seen_macro": (0.6 + 0.8) / 2,
            "acc/new": 0.8,
            "acc/task_aware": 35 / 40,
            "acc/task_identity": 32 / 40,
        }
    )


def test_after_the_last_task_the_final_metrics_are_known_too():
    assert metrics_after(EVALUATIONS, 3) == pytest.approx(
        {
            "acc/seen": 32 / 50,
            "acc/seen_macro": (0.7 + 0.5 + 1.0) / 3,
            "acc/new": 1.0,
            "acc/task_aware": 39 / 50,
            "acc/task_identity": 37 / 50,
            "acc/final": 32 / 50,
            "acc/avg_incremental": (9 / 10 + 30 / 40 + 32 / 50) / 3,
            "acc/avg_incremental_macro": (0.9 + (0.6 + 0.8) / 2 + (0.7 + 0.5 + 1.0) / 3) / 3,
            "forgetting": 0.25,
            "bwt": -0.25,
        }
    )


accuracies = st.integers(1, 6).flatmap(
    lambda tasks: st.tuples(
        *(st.lists(st.floats(0, 1), min_size=size, max_size=size) for size in range(1, tasks + 1))
    ).map(list)
)


@given(matrix=accuracies)
def test_forgetting_is_never_less_than_the_loss_that_backward_transfer_sees(matrix):
    assert -1 <= -backward_transfer(matrix) <= forgetting(matrix) + 1e-12 <= 1 + 1e-12


@given(matrix=accuracies.filter(lambda matrix: len(matrix) == 2))
def test_with_two_tasks_forgetting_is_backward_transfer_turned_round(matrix):
    assert forgetting(matrix) == pytest.approx(-backward_transfer(matrix))


def test_forward_transfer_is_the_accuracy_before_learning_above_chance():
    assert forward_transfer([0.4, 0.6], classes=4) == pytest.approx(0.5 - 0.25)
    assert forward_transfer([], classes=4) == 0.0


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=6))
def test_every_image_or_every_task_counting_alike_is_the_same_where_tasks_have_as_many_images(rows):
    most = max(images for images, _ in rows)
    rights = [min(correct, most) for _, correct in rows]
    evaluations = [tuple(counts(most, right) for right in rights[: i + 1]) for i in range(len(rights))]
    found = metrics_after(evaluations, len(rights))
    assert found["acc/seen_macro"] == pytest.approx(found["acc/final"])
    assert found["acc/avg_incremental_macro"] == pytest.approx(found["acc/avg_incremental"])


def test_every_metric_is_named_once_with_its_formula():
    named = [alias.here for alias in ALIASES]
    assert len(set(named)) == len(named)
    assert set(named) == set(metrics_after(EVALUATIONS, 3)) | {"fwt"}
    assert all(alias.field and alias.formula for alias in ALIASES)
    spoken = " ".join(alias.field for alias in ALIASES)
    assert all(word in spoken for word in ("A_last", "FAA", "A-bar", "CAA", "FFM", "BWT", "FWT"))
