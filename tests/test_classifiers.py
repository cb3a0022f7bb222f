"""Classifiers in closed form, on features that are made up: against other people's, against planted truths."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator
from sklearn.covariance import oas
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from inflora.adapters import inflora as inflora_adapter
from inflora.adapters.covariances import input_covariances
from inflora.classifiers import Classifier, make_classifier
from inflora.classifiers.aligned import Aligned
from inflora.classifiers.drift import drift_map
from inflora.classifiers.lda import discriminant, shrunk
from inflora.classifiers.qda import unpacked
from inflora.classifiers.ranpac import RanPAC, ridge_weights
from inflora.classifiers.statistics import class_covariances, class_means
from inflora.config import (
    ADAPTERS,
    CLASSIFIERS,
    AlignedSettings,
    FittedSettings,
)
from inflora.data.stream import Task
from inflora.features import Features
from inflora.gaussians import Gaussians
from inflora.lora import LoRALinear, adapted_layers
from inflora.state import StateError
from inflora.task_data import TaskData
from inflora.training import train_task
from tests.conftest import begun, pair_of, same_tensors, task_of_noise

D = 8
COUNTS = [[40, 25, 60], [30], [33, 50]]
"""Images of the classes of three tasks."""
SMALL = {"ranpac": {"features": 32}}
FITTED = [name for name, settings in CLASSIFIERS.items() if issubclass(settings, FittedSettings)]
GAUSSIAN = ["ncm", "lda", "qda"]
"""Of them, those that keep nothing but moments."""


def fitted(name: str, width: int = D, **settings: Any) -> Classifier[Any]:
    return make_classifier(CLASSIFIERS[name](**SMALL.get(name, {}) | settings), width)


def features(counts: Sequence[int], seed: int = 0, width: int = D, spread: float = 1.0) -> Features:
    """Classes around means of their own, each with a covariance of its own, in no order."""
    generator = torch.Generator().manual_seed(seed)
    classes = []
    for count in counts:
        mixing_DD = torch.eye(width) + 0.5 * torch.randn(width, width, generator=generator) / width**0.5
        noise_ND = torch.randn(count, width, generator=generator) @ mixing_DD
        classes.append(2 * torch.randn(width, generator=generator) + spread * noise_ND)
    labels_N = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    order_N = torch.randperm(len(labels_N), generator=generator)
    return Features(
        torch.cat(classes).double()[order_N], labels_N[order_N], torch.arange(len(labels_N)), classes=len(counts)
    )


def tasks_of(counts: Sequence[Sequence[int]] = COUNTS, **kwargs: Any) -> list[Features]:
    return [features(of_task, seed, **kwargs) for seed, of_task in enumerate(counts)]


def in_one(tasks: Sequence[Features]) -> Features:
    """All tasks' images as those of one task."""
    starts = np.cumsum([0, *(task.classes for task in tasks)])
    labels_N = torch.cat([task.labels_N + int(start) for task, start in zip(tasks, starts[:-1], strict=True)])
    everything_ND = torch.cat([task.features_ND for task in tasks])
    return Features(everything_ND, labels_N, torch.arange(len(labels_N)), int(starts[-1]))


def data_of(index: int, first: int, classes: int, seed: int = 0) -> TaskData:
    names = tuple(map(str, range(first, first + classes)))
    return task_of_noise(index, seed)._replace(task=Task(index, first, names, torch.arange(0), torch.arange(0)))


def learn(
    classifier: Classifier[Any], tasks: Sequence[Features], before: Sequence[Features | None] = (), seed: int = 0
) -> Any:
    """The classifier, when it has learnt some more tasks; ``before`` are their features before they moved."""
    for place, seen in enumerate(tasks):
        data = data_of(classifier.classes, classifier.classes, seen.classes, seed)
        classifier.begin_task(data)
        classifier.fit(seen, before[place] if before else None, data)
    return classifier


@torch.no_grad()
def answers(classifier: Classifier[Any], images: Features | Tensor) -> Tensor:
    features_ND = images.features_ND if isinstance(images, Features) else images
    return classifier(features_ND.float()).double()


def against_the_first(logits_NC: Tensor) -> Tensor:
    """Only differences between classes decide."""
    return logits_NC - logits_NC[:, :1]


def assert_same_answers(ours_NC: Tensor, theirs_NC: Tensor, rtol: float) -> None:
    """Differences between classes, up to ``rtol`` of the largest of them."""
    ours_NC, theirs_NC = against_the_first(ours_NC), against_the_first(torch.as_tensor(theirs_NC))
    assert float((ours_NC - theirs_NC).abs().max()) <= rtol * float(theirs_NC.abs().max())


# Against scikit-learn's.


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 0.5, 0.9])
def test_lda_over_three_tasks_answers_as_scikit_learns_on_all_images(shrinkage):
    tasks = tasks_of()
    images = in_one(tasks)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
    theirs.fit(images.features_ND.numpy(), images.labels_N.numpy())
    expected = torch.from_numpy(theirs.decision_function(images.features_ND.numpy()))
    ours = learn(fitted("lda", shrinkage=shrinkage), tasks)
    # What is kept is float32, the solution itself is not.
    assert_same_answers(answers(ours, images), expected, rtol=3e-6)
    count_C, mean_CD = class_means(images)
    centred_ND = images.features_ND - mean_CD[images.labels_N]
    cov_DD = shrunk(centred_ND.T @ centred_ND / len(centred_ND), len(centred_ND), shrinkage)
    weight_CD, bias_C = discriminant(mean_CD, cov_DD, (count_C / count_C.sum()).log())
    assert_same_answers(images.features_ND @ weight_CD.T + bias_C, expected, rtol=1e-9)


@pytest.mark.parametrize("count", [3, 20, 5000])
def test_ldas_own_shrinkage_is_the_oracle_approximating_one_of_so_many_images(count):
    images = features([count] * 3)
    _, mean_CD = class_means(images)
    centred_ND = (images.features_ND - mean_CD[images.labels_N]).numpy()
    expected_DD, share = oas(centred_ND, assume_centered=True)
    cov_DD = torch.from_numpy(centred_ND.T @ centred_ND / len(centred_ND))
    torch.testing.assert_close(shrunk(cov_DD, len(centred_ND), None), torch.from_numpy(expected_DD), atol=1e-9, rtol=0)
    assert 0 < share <= 1 and (share < 0.02) == (count == 5000)
    own, given = (learn(fitted("lda", shrinkage=of), [images]) for of in (None, float(share)))
    assert_same_answers(answers(own, images), answers(given, images), rtol=1e-5)


class Unbiased(BaseEstimator):
    """A class's covariance as it is kept here; scikit-learn's own choice of what to divide by has changed once."""

    def fit(self, images: np.ndarray) -> "Unbiased":
        self.covariance_ = np.cov(images.T)
        return self


def test_qda_over_three_tasks_answers_as_scikit_learns_on_all_images():
    pytest.importorskip("sklearn", minversion="1.8", reason="it takes an estimator of covariances from 1.8 on")
    tasks = tasks_of()
    images = in_one(tasks)
    theirs = QuadraticDiscriminantAnalysis(solver="eigen", covariance_estimator=Unbiased())
    theirs.fit(images.features_ND.numpy(), images.labels_N.numpy())
    expected = torch.from_numpy(theirs.decision_function(images.features_ND.numpy()))
    assert_same_answers(answers(learn(fitted("qda", pooling=0, shrinkage=0), tasks), images), expected, rtol=1e-6)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_qda_with_one_common_covariance_answers_as_lda_but_for_what_both_divide_by(shrinkage):
    """N images less C classes here, N there: distances differ by that factor, what is added of the classes does not."""
    tasks = tasks_of()
    images = in_one(tasks)
    qda, lda = (
        learn(fitted(name, shrinkage=shrinkage, **own), tasks) for name, own in (("qda", {"pooling": 1}), ("lda", {}))
    )
    count, priors_C = len(images.labels_N), qda.log_priors()
    factor = count / (count - images.classes)
    assert_same_answers(factor * (answers(qda, images) - priors_C), answers(lda, images) - priors_C, rtol=3e-6)


def test_pooling_and_shrinkage_of_qda_are_mixtures_of_covariances():
    images = features([30, 50, 40])
    classifier = learn(fitted("qda", pooling=0.25, shrinkage=0.5), [images])
    own_CDD = torch.stack([torch.cov(images.features_ND[images.labels_N == c].T) for c in range(3)])
    pooled_DD = torch.einsum("c,cde->de", torch.tensor([29.0, 49.0, 39.0]).double() / 117, own_CDD)
    mixed_CDD = 0.75 * own_CDD + 0.25 * pooled_DD
    variance_C = mixed_CDD.diagonal(dim1=1, dim2=2).mean(1)
    expected_CDD = 0.5 * mixed_CDD + 0.5 * variance_C[:, None, None] * torch.eye(D)
    found_CDD = torch.linalg.inv(classifier.whitening.double().mT @ classifier.whitening.double())
    torch.testing.assert_close(found_CDD, expected_CDD, atol=1e-5, rtol=0)


def random_features(classifier: RanPAC, images: Features) -> Tensor:
    return nn.functional.relu(images.features_ND @ classifier.projection.double())


def test_ranpacs_weights_are_those_of_ridge_regression_on_the_same_random_features():
    tasks = tasks_of()
    images = in_one(tasks)
    classifier = learn(fitted("ranpac"), tasks)
    random_NM = random_features(classifier, images)
    one_hot_NC = nn.functional.one_hot(images.labels_N).double()
    gram_MM, decade = random_NM.T @ random_NM, int(classifier.ridge)
    theirs = Ridge(alpha=10.0**decade * float(gram_MM.diagonal().mean()), fit_intercept=False, solver="cholesky")
    expected_CM = torch.from_numpy(theirs.fit(random_NM.numpy(), one_hot_NC.numpy()).coef_)
    exact_MC = ridge_weights(gram_MM, random_NM.T @ one_hot_NC, decade)
    torch.testing.assert_close(exact_MC.T, expected_CM, atol=1e-6 * float(expected_CM.abs().max()), rtol=0)
    torch.testing.assert_close(answers(classifier, images), random_NM @ expected_CM.T, atol=1e-4, rtol=0)


NOISE = {1e-3: "hardly any", 3.0: "some", 20.0: "nothing but"}


@pytest.mark.parametrize("spread", NOISE, ids=NOISE.values())
def test_the_ridge_is_the_best_of_all_on_held_out_images(spread):
    images = features([60, 40, 80], spread=spread)
    classifier = learn(fitted("ranpac"), [images])
    random_NM, held_N = random_features(classifier, images), images.places_N % 5 == 4
    one_hot_NC = nn.functional.one_hot(images.labels_N).double()
    errors = []
    for decade in range(-5, 5):
        weight_MC = ridge_weights(
            random_NM[~held_N].T @ random_NM[~held_N], random_NM[~held_N].T @ one_hot_NC[~held_N], decade
        )
        errors.append(float((random_NM[held_N] @ weight_MC - one_hot_NC[held_N]).square().sum()))
    best = int(np.argmin(errors))
    assert np.all(np.diff(errors[: best + 1]) < 0) and np.all(np.diff(errors[best:]) > 0), "else a hill hides it"
    assert int(classifier.ridge) == best - 5


def test_more_noise_asks_for_more_ridge():
    ridges = [int(learn(fitted("ranpac"), [features([60, 40, 80], spread=of)]).ridge) for of in NOISE]
    assert ridges == sorted(ridges) and ridges[0] < ridges[-1]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_task_too_small_to_hold_images_out_is_learnt_with_the_ridge_there_was(count):
    first, small = features([60, 40]), features([count], seed=1)
    classifier = learn(fitted("ranpac"), [first])
    ridge = int(classifier.ridge)
    learn(classifier, [small])
    assert int(classifier.ridge) == ridge and classifier.classes == 3
    assert torch.equal(classifier.counts, torch.tensor([60.0, 40, count]))
    assert (answers(classifier, small).argmax(1) == 2).any()


def test_the_projection_is_the_same_for_the_same_seed_and_after_being_restored():
    tasks = tasks_of()
    one, again, other = (learn(fitted("ranpac"), tasks, seed=seed).projection for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    first = learn(fitted("ranpac"), tasks[:1])
    restored = fitted("ranpac")
    restored.load_state(first.state())
    assert torch.equal(learn(restored, tasks[1:], seed=2).projection, one)


# What must not matter.


@pytest.mark.parametrize("name", FITTED)
def test_what_is_restored_goes_on_as_if_it_had_never_stopped(name):
    tasks, restored = tasks_of(), fitted(name)
    whole, stopped = learn(fitted(name), tasks), learn(fitted(name), tasks[:2])
    restored.load_state(stopped.state())
    assert torch.equal(answers(restored, tasks[0]), answers(stopped, tasks[0]))
    assert same_tensors(learn(restored, tasks[2:]).state(), whole.state())


@pytest.mark.parametrize("name", GAUSSIAN)
def test_classes_learnt_in_one_task_or_in_several_are_told_apart_alike(name):
    tasks = tasks_of()
    several, one = learn(fitted(name), tasks), learn(fitted(name), [in_one(tasks)])
    assert_same_answers(answers(several, in_one(tasks)), answers(one, in_one(tasks)), rtol=3e-6)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_the_order_of_images_does_not_matter(name):
    images = features([30, 20, 40])
    backwards = images._replace(features_ND=images.features_ND.flip(0), labels_N=images.labels_N.flip(0))
    ours, theirs = (answers(learn(fitted(name), [of]), images) for of in (backwards, images))
    assert_same_answers(ours, theirs, rtol=3e-6)


@pytest.mark.parametrize("name", FITTED)
def test_most_images_of_classes_far_apart_are_told_apart(name):
    tasks = tasks_of(spread=0.3)
    images = in_one(tasks)
    right = answers(learn(fitted(name), tasks), images).argmax(1) == images.labels_N
    assert right.double().mean() > 0.95


# Few images, equal ones, large ones.


@pytest.mark.parametrize("settings", [{}, {"shrinkage": 0}, {"shrinkage": 0, "pooling": 0}], ids=str)
@pytest.mark.parametrize("empty", [0, 1, 2])
@pytest.mark.parametrize("name", FITTED)
def test_a_class_without_images_is_never_the_answer(name, empty, settings):
    own = {key: value for key, value in settings.items() if key in CLASSIFIERS[name].model_fields}
    counts = [20, 20, 20]
    counts[empty] = 0
    classifier = learn(fitted(name, **own), [features(counts), features([15], seed=1)])
    directions = torch.cat([torch.eye(D), -torch.eye(D), torch.randn(50, D)])
    asked = torch.cat([scale * directions for scale in (0.0, 1e-3, 1.0, 1e3, 1e6)])
    logits = answers(classifier, asked)
    assert logits.isfinite().all()
    assert (logits.argmax(1) != empty).all()


@pytest.mark.parametrize("settings", [{}, {"shrinkage": 0}], ids=str)
@pytest.mark.parametrize("name", FITTED)
def test_a_class_with_one_image_is_the_answer_to_it_and_harms_no_other(name, settings):
    own = {key: value for key, value in settings.items() if key in CLASSIFIERS[name].model_fields}
    many, single = features([40, 40], spread=0.3), features([1], seed=1)
    classifier = learn(fitted(name, **own), [many, single])
    assert answers(classifier, single).argmax(1).tolist() == [2]
    assert (answers(classifier, many).argmax(1) == many.labels_N).double().mean() > 0.95


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
@pytest.mark.parametrize("name", FITTED)
def test_features_that_are_all_equal_give_finite_answers(name, value):
    images = features([5, 7, 2])
    equal = images._replace(features_ND=torch.full_like(images.features_ND, value))
    classifier = learn(fitted(name), [equal, equal])
    assert classifier.classes == 6
    assert answers(classifier, equal).isfinite().all()


@pytest.mark.parametrize("name", FITTED)
def test_classes_of_equal_features_are_told_apart_by_their_means(name):
    images = features([5, 7, 4])
    _, mean_CD = class_means(images)
    points = images._replace(features_ND=mean_CD[images.labels_N])
    assert torch.equal(answers(learn(fitted(name), [points]), points).argmax(1), images.labels_N)


@pytest.mark.parametrize("scale", [1e-6, 1e3, 1e9, 1e15, 1e18, 1e20, 1e30, 1e38])
@pytest.mark.parametrize("name", [*FITTED, "aligned"])
def test_features_of_any_scale_are_learnt_or_stop_the_run_in_one_line(name, scale):
    images = features([20, 25, 30], spread=0.3)
    scaled = images._replace(features_ND=scale * images.features_ND)
    classifier = fitted(name, **({"drift": 0.1} if name == "aligned" else {}))
    said = ""
    try:
        learn(classifier, [scaled])
        # And from the second task on what is remembered follows.
        learn(classifier, [scaled], [scaled._replace(features_ND=1.1 * scaled.features_ND)])
    except FloatingPointError as error:
        said = str(error)
    if said:
        assert scale > 1e3
        assert len(said.splitlines()) == 1 and "optim.lr" in said
    else:
        assert all(tensor.isfinite().all() for tensor in classifier.state().values())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("name", FITTED)
def test_the_scale_of_features_changes_no_answer(name, scale):
    images = features([20, 25, 30], spread=0.3)
    scaled = images._replace(features_ND=scale * images.features_ND)
    right = answers(learn(fitted(name), [scaled]), scaled).argmax(1) == images.labels_N
    assert right.double().mean() > 0.95


@pytest.mark.parametrize("settings", [{}, {"shrinkage": 0}], ids=str)
@pytest.mark.parametrize("name", FITTED)
def test_more_dimensions_than_images_are_no_hindrance(name, settings):
    own = {key: value for key, value in settings.items() if key in CLASSIFIERS[name].model_fields}
    tasks = [features([6, 5, 4], seed, width=64, spread=0.3) for seed in range(2)]
    classifier = learn(fitted(name, 64, **own), tasks)
    logits = answers(classifier, in_one(tasks))
    assert logits.isfinite().all()
    assert (logits.argmax(1) == in_one(tasks).labels_N).double().mean() > 0.9


# Drift: features that a task has moved.

MAP = torch.eye(D).double() + 0.1 * torch.randn(D, D, generator=torch.Generator().manual_seed(9)).double()


def moved(images: Features, map_DD: Tensor = MAP) -> Features:
    return images._replace(features_ND=images.features_ND @ map_DD)


def after_drift(name: str, drift: float | None) -> tuple[Any, Features, Features]:
    """A classifier that has learnt an old task, then a new one that moved all features; both tasks' features before."""
    old, new = features([40, 25, 60]), features([50, 30], seed=1)
    settings = {"epochs": 1, "samples": 4} if name == "aligned" else {}
    classifier = learn(fitted(name, drift=drift, **settings), [old])
    return learn(classifier, [moved(new)], [new]), old, new


TINY_RIDGE = 1e-12


def test_the_map_found_between_features_before_and_after_is_the_one_that_moved_them():
    images = features([50, 30])
    torch.testing.assert_close(
        drift_map(images.features_ND, moved(images).features_ND, TINY_RIDGE), MAP, atol=1e-8, rtol=0
    )


def test_the_map_is_the_one_that_minimises_what_it_is_said_to_minimise():
    before_ND, after_ND = features([9]).features_ND, features([9], seed=1).features_ND
    map_DD = drift_map(before_ND, after_ND, 0.3).requires_grad_()
    ridge = 0.3 * before_ND.square().sum() / D
    loss = (after_ND - before_ND @ map_DD).square().sum() + ridge * (map_DD - torch.eye(D)).square().sum()
    (grad_DD,) = torch.autograd.grad(loss, map_DD)
    assert grad_DD.abs().max() < 1e-9 * float(ridge)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_old_means_are_those_of_the_features_where_they_have_moved_to(name):
    classifier, old, new = after_drift(name, TINY_RIDGE)
    expected_CD = torch.cat([class_means(moved(of))[1] for of in (old, new)])
    torch.testing.assert_close(classifier.means.double(), expected_CD, atol=1e-5, rtol=0)


def test_ldas_scatter_is_that_of_the_features_where_they_have_moved_to():
    classifier, old, new = after_drift("lda", TINY_RIDGE)
    both = in_one([moved(old), moved(new)])
    centred_ND = both.features_ND - class_means(both)[1][both.labels_N]
    torch.testing.assert_close(classifier.scatter.double(), centred_ND.T @ centred_ND, atol=1e-3, rtol=1e-5)


def covariances_of(images: Features) -> Tensor:
    return class_covariances(images, *class_means(images))


def test_qdas_covariances_are_those_of_the_features_where_they_have_moved_to():
    classifier, old, new = after_drift("qda", TINY_RIDGE)
    expected_CDD = torch.cat([covariances_of(moved(of)) for of in (old, new)])
    torch.testing.assert_close(unpacked(classifier.covariances, D), expected_CDD, atol=1e-5, rtol=0)


def test_the_gaussians_of_aligned_heads_are_those_of_the_features_where_they_have_moved_to():
    classifier, old, _ = after_drift("aligned", TINY_RIDGE)
    torch.testing.assert_close(classifier.gaussians[0].mean_CD.double(), class_means(moved(old))[1], atol=1e-5, rtol=0)
    expected_CDD = covariances_of(moved(old))
    torch.testing.assert_close(
        classifier.gaussians[0].covariances().double(), expected_CDD, atol=2e-3 * float(expected_CDD.max()), rtol=0
    )


def test_ranpacs_projection_makes_of_moved_features_the_random_features_that_it_remembers():
    classifier, old, _ = after_drift("ranpac", TINY_RIDGE)
    still = learn(fitted("ranpac"), [old])
    torch.testing.assert_close(
        random_features(classifier, moved(old)), random_features(still, old), atol=1e-4, rtol=1e-4
    )
    assert not torch.equal(classifier.projection, still.projection)


@pytest.mark.parametrize("name", FITTED)
def test_old_images_are_told_apart_where_they_have_moved_to(name):
    """And by fewer where what is remembered has not followed."""
    far_DD = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3)).double()).Q
    old, new = features([40, 30, 50], spread=0.3), features([60, 60], seed=1, spread=0.3)

    def right(drift: float | None) -> float:
        classifier = learn(fitted(name, drift=drift), [old])
        learn(classifier, [moved(new, far_DD)], [new])
        return float((answers(classifier, moved(old, far_DD)).argmax(1) == old.labels_N).double().mean())

    assert right(TINY_RIDGE) > 0.95 > right(None) + 0.2


def old_part(name: str, state: dict[str, Tensor], classes: int) -> dict[str, Tensor]:
    """What a state says of the first classes alone; RanPAC's projection is of all."""
    rows = {key: state[key][:classes] for key in ("counts", "means", "covariances") if key in state}
    whole = {key: state[key] for key in ("projection", "means/0", "factors/0") if key in state}
    return rows | whole


@pytest.mark.parametrize("name", [*FITTED, "aligned"])
def test_without_compensation_old_classes_stay_as_they_were_learnt(name):
    classifier, old, _ = after_drift(name, None)
    alone = learn(fitted(name, drift=None), [old])
    assert not classifier.follows_drift
    ours, theirs = (old_part(name, each.state(), 3) for each in (classifier, alone))
    assert ours and same_tensors(ours, theirs)
    followed = old_part(name, after_drift(name, TINY_RIDGE)[0].state(), 3)
    assert not same_tensors(followed, theirs)


@pytest.mark.parametrize("name", [*FITTED, "aligned"])
def test_what_is_remembered_stays_bit_for_bit_where_nothing_has_moved(name):
    old, new = features([40, 25, 60]), features([50, 30], seed=1)
    settings = {"epochs": 1, "samples": 4} if name == "aligned" else {}
    still, followed = (
        learn(learn(fitted(name, drift=0.01, **settings), [old]), [new], [before]) for before in (None, new)
    )
    assert same_tensors(still.state(), followed.state())


@pytest.mark.parametrize("ridge", [1e-6, 0.01])
def test_directions_that_few_images_do_not_show_stay_where_they_are(ridge):
    before_ND = features([3], width=16).features_ND
    after_ND = before_ND @ (torch.eye(16).double() + torch.randn(16, 16).double())
    map_DD = drift_map(before_ND, after_ND, ridge)
    hidden_KD = torch.linalg.svd(before_ND).Vh[3:]
    torch.testing.assert_close(hidden_KD @ map_DD, hidden_KD, atol=1e-8, rtol=0)
    assert (before_ND @ map_DD - before_ND).abs().max() > 0.1


@pytest.mark.parametrize("name", ["ncm", "lda", "qda"])
def test_a_mean_that_few_images_do_not_show_does_not_move(name):
    old, new = features([30, 30], width=16), features([3], seed=1, width=16)
    shown_KD = torch.linalg.svd(new.features_ND).Vh[:3]
    hidden = old._replace(features_ND=old.features_ND - old.features_ND @ shown_KD.T @ shown_KD)
    classifier = learn(fitted(name, 16, drift=1e-6), [hidden])
    before_CD = classifier.means.clone()
    learn(classifier, [moved(new, torch.eye(16).double() + 0.3 * torch.randn(16, 16).double())], [new])
    torch.testing.assert_close(classifier.means[:2], before_CD, atol=1e-5, rtol=0)


@pytest.mark.parametrize("ridge", [0.0, 0.01])
@pytest.mark.parametrize("name", [*FITTED, "aligned"])
def test_features_that_a_task_has_made_all_zero_are_followed_too(name, ridge):
    old, new = features([20, 20]), features([20, 20], seed=1)
    settings = {"epochs": 1, "samples": 4} if name == "aligned" else {}
    gone = new._replace(features_ND=torch.zeros_like(new.features_ND))
    for after, before in ((gone, new), (new, gone)):
        classifier = learn(learn(fitted(name, drift=ridge, **settings), [old]), [after], [before])
        assert all(tensor.isfinite().all() for tensor in classifier.state().values())


@pytest.mark.parametrize(
    "map_DD",
    [MAP, torch.diag(torch.tensor([1.0] * 4 + [0.0] * 4)).double() @ MAP, -MAP],
    ids=["near 1", "flat", "back"],
)
def test_the_gaussians_of_moved_features_have_the_moved_covariances_to_half_precision(map_DD):
    gaussians = Gaussians.of(class_means(features([90, 60]))[1], covariances_of(features([90, 60])))
    root_CDD = gaussians.roots().double()
    carried = gaussians.carried(map_DD)
    expected_CDD = map_DD.T @ root_CDD @ root_CDD.mT @ map_DD
    found_CDD = carried.roots().double() @ carried.roots().double().mT
    torch.testing.assert_close(found_CDD, expected_CDD, atol=2e-3 * float(expected_CDD.abs().max()), rtol=0)
    torch.testing.assert_close(carried.mean_CD.double(), gaussians.mean_CD.double() @ map_DD, atol=1e-6, rtol=1e-6)
    assert (carried.roots().diagonal(dim1=1, dim2=2) >= 0).all()


# What is kept, and what is served.


def test_a_hundred_classes_of_lda_take_less_than_a_megabyte():
    classifier = learn(fitted("lda", 128), [features([3] * 100, width=128)])
    assert classifier.classes == 100
    assert sum(tensor.nbytes for tensor in classifier.state().values()) < 1_000_000


@pytest.mark.parametrize("name", FITTED)
def test_what_is_kept_is_what_the_layout_says(name):
    classifier = learn(fitted(name), tasks_of())
    layout = classifier.layout([3, 1, 2])
    assert layout.keys() == classifier.state().keys()
    assert all(spec.admits(classifier.state()[key]) for key, spec in layout.items())


@pytest.mark.parametrize("name", ["ncm", "lda"])
def test_one_linear_layer_gives_the_same_logits(name):
    tasks = tasks_of()
    classifier = learn(fitted(name), tasks)
    linear = classifier.as_linear()
    assert type(linear) is nn.Linear
    with torch.no_grad():
        theirs = linear(tasks[0].features_ND.float()).double()
    torch.testing.assert_close(theirs, answers(classifier, tasks[0]), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["qda", "ranpac"])
def test_what_is_not_linear_in_features_is_no_linear_layer(name):
    assert learn(fitted(name), tasks_of()).as_linear() is None


def test_the_head_that_led_the_adapter_is_thrown_away_with_its_task():
    classifier = fitted("lda")
    classifier.begin_task(data_of(0, 0, 3))
    assert len(classifier.task_parameters()) == 2
    classifier.fit(features([5, 5, 5]), None, data_of(0, 0, 3))
    assert classifier.task_parameters() == [] and "head.weight" not in classifier.state()


# Alignment for so many updates.


@pytest.mark.parametrize(
    ("settings", "classes", "epochs"),
    [
        ({"epochs": 5}, 20, 5),
        ({"steps": 100}, 20, 5),
        ({"steps": 101}, 20, 6),
        ({"steps": 1}, 20, 1),
        ({"steps": 7}, 1, 7),
    ],
)
def test_steps_are_made_of_whole_epochs_an_update_for_each_class(settings, classes, epochs):
    assert AlignedSettings(**settings).epochs_of(classes) == epochs


@pytest.mark.parametrize("counts", [[10, 10, 10], [10, 0, 10]], ids=["every class", "a class without images"])
@pytest.mark.parametrize("steps", [1, 7, 23])
def test_alignment_makes_at_least_the_steps_asked_for_with_rates_that_fall_to_the_end(steps, counts, monkeypatch):
    rates: list[float] = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1])
    tasks = [features(counts), features([10, 10], seed=1)]
    classifier = learn(fitted("aligned", steps=steps, samples=4, lr=0.1), tasks)
    classes = 2 + sum(count > 0 for count in counts)
    assert steps <= len(rates) < steps + classes
    epochs = len(rates) // classes
    assert rates == pytest.approx(
        [0.1 * (1 + math.cos(math.pi * n / epochs)) / 2 for n in range(epochs) for _ in range(classes)]
    )
    assert isinstance(classifier, Aligned)


# A share of an update that is merged.

SHARE = 0.25


@pytest.mark.parametrize("rows", [(slice(None),), (slice(4, 8), slice(8, 12))], ids=["all", "some"])
def test_a_share_of_an_update_changes_the_weight_by_as_much_of_its_product(rows):
    plain = nn.Linear(D, 12)
    layer = LoRALinear(plain, rows)
    before, lora_A = layer.weight.detach().clone(), torch.randn(3, D)
    layer.attach(lora_A)
    lora_B = torch.randn_like(layer.lora_B)
    layer.lora_B.data.copy_(lora_B)
    factors = layer.merge(SHARE)
    expected = before.clone()
    for part, own in zip(layer.rows, (lora_B @ lora_A).split(layer.sizes), strict=True):
        expected[part] += SHARE * own
    torch.testing.assert_close(layer.weight.detach(), expected)
    torch.testing.assert_close(factors, (lora_A, SHARE * lora_B))


MERGING = ["lora", "olora", "inflora"]
SHARES = {
    "all tasks'": {"adapter.merge": SHARE},
    "the first task's": {"adapter.merge": 0.75, "adapter.first_merge": SHARE},
}


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("name", MERGING)
def test_the_end_of_a_task_merges_the_share_and_gives_back_what_it_has_merged(name, shares, tiny):
    model, adapter, data = begun(tiny, pair_of(name) | shares)
    train_task(model, adapter, data, lambda _: None)
    before = {
        key: (layer.weight.clone(), layer.lora_A.detach().clone(), layer.lora_B.detach().clone())
        for key, layer in adapted_layers(model)
    }
    factors = adapter.end_task(model, data)
    for key, layer in adapted_layers(model):
        weight, lora_A, lora_B = before[key]
        assert lora_B.abs().max() > 1e-4
        assert torch.equal(factors[f"{key}.lora_A"], lora_A)
        assert torch.equal(factors[f"{key}.lora_B"], SHARE * lora_B)
        gained = torch.cat([(layer.weight - weight)[rows] for rows in layer.rows])
        torch.testing.assert_close(gained, SHARE * lora_B @ lora_A, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", [*MERGING, "sdlora"])
def test_later_tasks_have_the_common_share(name):
    settings = ADAPTERS[name](merge=0.75, first_merge=SHARE)
    assert [settings.share_merged(task) for task in range(3)] == [SHARE, 0.75, 0.75]
    assert [ADAPTERS[name](merge=0.75).share_merged(task) for task in range(2)] == [0.75, 0.75]


def test_inflora_remembers_what_the_model_reads_with_the_share_merged(tiny, monkeypatch):
    model, adapter, data = begun(tiny, pair_of("inflora") | {"adapter.merge": SHARE})
    train_task(model, adapter, data, lambda _: None)
    seen: list[dict[str, Tensor]] = []

    def watched(model: Any, data: TaskData, purpose: str) -> dict[str, Tensor]:
        assert all(layer.lora_A is None for _, layer in adapted_layers(model))
        seen.append(input_covariances(model, data, purpose))
        return seen[-1]

    monkeypatch.setattr(inflora_adapter, "input_covariances", watched)
    adapter.end_task(model, data)
    (gathered,) = seen
    assert same_tensors(gathered, input_covariances(model, data, "after"))
    assert adapter.memory.keys() == gathered.keys()


def test_sdloras_new_direction_is_the_share_of_the_update_and_its_magnitude_one(tiny):
    model, adapter, data = begun(tiny, pair_of("sdlora") | {"adapter.merge": SHARE})
    train_task(model, adapter, data, lambda _: None)
    before = {
        key: (layer.lora_A.detach().clone(), layer.lora_B.detach().clone()) for key, layer in adapted_layers(model)
    }
    adapter.end_task(model, data)
    for key, layer in adapted_layers(model):
        lora_A, lora_B = before[key]
        assert layer.magnitudes.tolist() == [1.0]
        assert torch.equal(layer.old_A[0], lora_A)
        assert torch.equal(layer.old_B[0], SHARE * lora_B)
        gained = torch.cat([(layer.merged_weight() - layer.weight)[rows] for rows in layer.rows])
        torch.testing.assert_close(gained, SHARE * lora_B @ lora_A, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("name", "part"), [("lda", "scatter"), ("qda", "covariances"), ("ranpac", "gram")])
def test_statistics_that_no_images_could_have_are_a_damaged_state(name, part):
    classifier = learn(fitted(name), tasks_of())
    state = classifier.state()
    state[part] = -1e3 * state[part].abs() - 1
    with pytest.raises(StateError, match="damaged"):
        fitted(name).load_state(state)


def test_a_ridge_beyond_all_numbers_is_a_damaged_state():
    state = learn(fitted("ranpac"), tasks_of()).state() | {"ridge": torch.tensor(1e9)}
    with pytest.raises(StateError, match="damaged"):
        fitted("ranpac").load_state(state)
