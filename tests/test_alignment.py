"""Classifier alignment: Gaussians of the classes' features, what is drawn from them, and what it does to a run."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from inflora.classifiers import Classifier
from inflora.classifiers.aligned import Aligned, Batches, align, normalised
from inflora.classifiers.linear import Linear
from inflora.classifiers.ncm import NCM
from inflora.classifiers.statistics import class_covariances, class_means
from inflora.config import AlignedSettings, ConfigError, LinearSettings, NCMSettings, RunConfig, override
from inflora.continual import run
from inflora.data.loader import Batch
from inflora.data.store import Images
from inflora.draws import Draws
from inflora.features import features_of
from inflora.gaussians import Gaussians, sample
from inflora.state import RunState
from inflora.task_data import TaskData
from tests.conftest import same_tensors, task_of_noise

WIDTH = 4


class Identity:
    """A model whose features are its inputs."""

    width = WIDTH

    def features(self, images: Tensor) -> Tensor:
        return images


class FeatureData(TaskData):
    """A task whose images are features already, in batches of uneven size."""

    def plain(self) -> Iterator[Batch]:
        features, labels, _ = self.images
        for rows in torch.arange(len(labels)).split(7):
            yield Batch(features[rows], labels[rows], len(rows) / len(labels))


def data_of(index: int, features: Tensor, labels: Tensor, seed: int = 0) -> FeatureData:
    return FeatureData(*task_of_noise(index, seed)._replace(images=Images(features, labels, labels)))


def linear_of(tasks: int) -> Linear:
    """The heads of so many tasks of two classes, as they begin."""
    classifier = Linear(LinearSettings(), WIDTH)
    for index in range(tasks):
        classifier.begin_task(task_of_noise(index))
    return classifier


def made_up(index: int, count: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    labels = 2 * index + torch.arange(count) % 2
    return torch.randn(count, WIDTH, generator=generator) * 0.1 + torch.eye(WIDTH)[labels % WIDTH], labels


def gaussians_of(data: TaskData) -> tuple[Tensor, Tensor]:
    """Means and covariances (float64) of the features of a task's classes."""
    seen = features_of(Identity(), data)
    count_C, mean_CD = class_means(seen)
    return mean_CD, class_covariances(seen, count_C, mean_CD)


def learn(classifier: Classifier[Any], data: TaskData) -> None:
    """The end of a task whose features nothing has moved."""
    classifier.fit(features_of(Identity(), data), None, data)


def test_means_and_covariances_are_those_of_each_classs_features():
    features, labels = made_up(1)
    mean_CD, cov_CDD = gaussians_of(data_of(1, features, labels))
    for c in range(2):
        own = features[labels == 2 + c].double()
        torch.testing.assert_close(mean_CD[c], own.mean(0))
        torch.testing.assert_close(cov_CDD[c], torch.cov(own.T))


def test_a_class_with_one_image_or_none_has_no_covariance():
    mean_CD, cov_CDD = gaussians_of(data_of(0, torch.ones(1, WIDTH), torch.zeros(1).long()))
    assert torch.equal(mean_CD, torch.stack([torch.ones(WIDTH), torch.zeros(WIDTH)]).double())
    assert not cov_CDD.any()


def test_covariances_keep_six_digits_where_features_vary_by_a_ten_thousandth_of_their_means():
    features, labels = made_up(0, 400)
    _, cov_CDD = gaussians_of(data_of(0, features + 1000, labels))
    for c in range(2):
        own = (features + 1000)[labels == c].double()
        torch.testing.assert_close(cov_CDD[c], torch.cov(own.T), atol=1e-6 * 0.1**2, rtol=0)


def covariances(*shape: int, images: int) -> Tensor:
    """Covariances (shape x D x D, float64) of as many images of unlike scales in every direction."""
    features = torch.randn(*shape[:-1], images, shape[-1]) * torch.logspace(-2, 2, shape[-1])
    mixed = (features @ torch.linalg.qr(torch.randn(shape[-1], shape[-1])).Q).double()
    mixed = mixed - mixed.mean(dim=-2, keepdim=True)
    return mixed.mT @ mixed / (images - 1)


@pytest.mark.parametrize("images", [2, 20, 2000], ids="{} images".format)
@pytest.mark.parametrize("scale", [1e-3, 1, 100])
def test_what_is_remembered_of_a_covariance_differs_from_it_by_less_than_a_thousandth(scale, images):
    cov_CDD = scale**2 * covariances(3, 48, images=images)
    remembered = Gaussians.of(torch.ones(3, 48).double(), cov_CDD).covariances()
    errors_C = (remembered - cov_CDD).flatten(1).norm(dim=1)
    assert (errors_C <= 1e-3 * cov_CDD.flatten(1).norm(dim=1) + 1e-6).all()


def test_a_class_takes_half_a_square_in_half_precision_and_its_mean():
    remembered = Gaussians.of(torch.ones(3, 48).double(), covariances(3, 48, images=20))
    assert sum(part.nbytes for part in remembered) == 3 * (2 * 48 * 49 // 2 + 4 * 48)


def test_the_first_task_is_remembered_and_the_second_aligns_every_head():
    classifier = Aligned(AlignedSettings(epochs=2), WIDTH)
    first, second = (data_of(index, *made_up(index)) for index in range(2))
    classifier.begin_task(first)
    before = classifier.heads[0].weight.clone()
    learn(classifier, first)
    assert torch.equal(classifier.heads[0].weight, before)
    classifier.begin_task(second)
    newer = classifier.heads[1].bias.clone()
    learn(classifier, second)
    assert not torch.equal(classifier.heads[0].weight, before)
    assert not torch.equal(classifier.heads[1].bias, newer)
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_drawn_features_have_the_classes_moments_with_older_means_shrunk_more():
    mean_CD, cov_CDD = gaussians_of(data_of(0, *made_up(0)))
    means, covs = torch.cat([mean_CD, mean_CD + 1]), torch.cat([cov_CDD, 2 * cov_CDD])
    tasks = [Gaussians.of(means[:2], covs[:2]), Gaussians.of(means[2:], covs[2:])]
    drawn = sample(tasks, 20_000, torch.Generator().manual_seed(0)).split(20_000)
    assert len(drawn) == 4
    for c, features in enumerate(drawn):
        torch.testing.assert_close(features.mean(0), [0.95, 1.0][c // 2] * means[c].float(), atol=5e-3, rtol=0)
        ridge = covs[c].float() + 1e-4 * torch.eye(WIDTH)
        torch.testing.assert_close(torch.cov(features.T), ridge, atol=1e-3, rtol=0)


def remembered(tasks: int, samples: int = 8, epochs: int = 1) -> Aligned:
    """A classifier that remembers so many tasks of two made-up classes each, and has not been aligned."""
    classifier = Aligned(AlignedSettings(epochs=epochs, samples=samples), WIDTH)
    for index in range(tasks):
        data = data_of(index, *made_up(index))
        classifier.begin_task(data)
        classifier.gaussians.append(Gaussians.of(*gaussians_of(data)))
    return classifier


def epochs_of(classifier: Aligned, task: int, seed: int = 0) -> list[list[tuple[Tensor, Tensor]]]:
    return [list(batches) for batches in classifier._epochs(data_of(task, *made_up(task), seed))]


def test_an_epoch_is_one_batch_for_each_class_and_shuffles_what_it_draws():
    for batches in epochs_of(remembered(2, samples=8, epochs=2), task=1):
        assert [features.shape for features, _ in batches] == [(8, WIDTH)] * 4
        classes = torch.cat([classes for _, classes in batches])
        assert classes.bincount().tolist() == [8] * 4
        assert not torch.equal(classes, classes.sort().values)


def test_every_epoch_task_and_seed_draws_features_of_its_own_and_the_same_again():
    classifier, one = remembered(3, epochs=2), (2, 0)
    drawn = {key: epochs_of(classifier, *key) for key in ((2, 0), (1, 0), (2, 1))}
    firsts = [epoch[0][0] for epochs in drawn.values() for epoch in epochs]
    assert all(not torch.equal(a, b) for i, a in enumerate(firsts) for b in firsts[:i])
    assert torch.equal(epochs_of(classifier, *one)[1][0][0], drawn[one][1][0][0])


def test_the_gaussians_and_the_heads_are_restored_as_they_were():
    classifier, restored = remembered(2), Aligned(AlignedSettings(epochs=1), WIDTH)
    restored.load_state(classifier.state())
    for ours, theirs in zip(restored.gaussians, classifier.gaussians, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert same_tensors(restored.heads.state_dict(), classifier.heads.state_dict())


def test_alignment_steps_are_those_of_sgd_with_momentum_decay_and_a_cosine():
    """Against the update written out, in float64."""
    settings = AlignedSettings(epochs=3, lr=0.1, weight_decay=0.01)
    classifier, head = Linear(LinearSettings(), 2), nn.Linear(2, 3, dtype=torch.float64)
    classifier.heads.append(head)
    features, classes = torch.randn(5, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
    speed_W, speed_b = torch.zeros_like(weight), torch.zeros_like(bias)
    align(classifier, [[(features, classes)] * 2] * 3, settings, 3)
    for epoch in range(3):
        for _ in range(2):
            error = (features @ weight.T + bias).softmax(1) - nn.functional.one_hot(classes, 3)
            speed_W = 0.9 * speed_W + error.T @ features / 5 + 0.01 * weight
            speed_b = 0.9 * speed_b + error.mean(0) + 0.01 * bias
            rate = 0.1 * (1 + math.cos(math.pi * epoch / 3)) / 2
            weight, bias = weight - rate * speed_W, bias - rate * speed_b
    torch.testing.assert_close(head.weight.detach(), weight)
    torch.testing.assert_close(head.bias.detach(), bias)


def test_classifiers_that_are_trained_together_learn_what_each_would_beside_the_others():
    """Against one parameter for each, and the norms of their logits one by one."""
    classifier = linear_of(3)
    expected = [parameter.detach().clone().requires_grad_() for parameter in classifier.parameters()]
    features, classes = torch.randn(16, WIDTH), torch.arange(16) % 6
    align(classifier, [[(features, classes)] * 3], AlignedSettings(lr=0.1, temperature=0.1), 1)
    optimizer = torch.optim.SGD(expected, lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(3):
        logits = [features @ w.T + b for w, b in zip(expected[::2], expected[1::2], strict=True)]
        norms = sum(part.norm(dim=1, keepdim=True) for part in logits) / 3
        optimizer.zero_grad()
        nn.functional.cross_entropy(torch.cat(logits, dim=1) / norms / 0.1, classes).backward()
        optimizer.step()
    torch.testing.assert_close(list(classifier.parameters()), expected, check_stride=False)


IN_TASKS = torch.block_diag(torch.ones(2, 1), torch.ones(3, 1))


def test_normalised_logits_are_divided_by_the_mean_norm_of_the_tasks_logits():
    logits = torch.tensor([[3.0, 4.0, 0.0, 0.0, 15.0]])
    torch.testing.assert_close(normalised(logits, IN_TASKS, 0.1), logits / 10 / 0.1, atol=1e-4, rtol=0)


def test_a_classifier_that_is_still_zero_is_aligned_too():
    logits = torch.tensor([[3.0, 4.0, 0.0, 0.0, 0.0]], requires_grad=True)
    normalised(logits, IN_TASKS, 0.1).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


class Operations(TorchDispatchMode):
    """Counts what is computed, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.seen[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_a_step_is_as_many_operations_after_ten_tasks_as_after_two(temperature):
    settings = AlignedSettings(temperature=temperature)

    def operations(tasks: int, steps: int) -> Counter[str]:
        batch = torch.randn(8, WIDTH), torch.arange(8) % (2 * tasks)
        with Operations() as operations:
            align(linear_of(tasks), [[batch] * steps], settings, 1)
        return operations.seen

    of_a_step = {tasks: operations(tasks, 3) - operations(tasks, 2) for tasks in (2, 10)}
    assert of_a_step[2] == of_a_step[10]
    assert 20 < of_a_step[10].total() < 70


MAKE_THE_HOST_WAIT = {"_local_scalar_dense", "nonzero", "equal", "index", "masked_select", "lift_fresh"}
"""``index``: by a mask, perhaps."""


def test_no_epoch_waits_for_the_device():
    """What must be asked is asked before the first."""
    classifier = remembered(3, epochs=2)

    def watched() -> Iterator[Batches]:
        epochs = classifier._epochs(data_of(2, *made_up(2)))
        yield next(epochs)
        with Operations() as operations:
            yield from epochs
        assert "randn" in operations.seen and operations.seen.keys().isdisjoint(MAKE_THE_HOST_WAIT)

    align(classifier, watched(), AlignedSettings(temperature=0.1), 2)


def test_no_step_needs_a_number_that_it_has_computed():
    """As where there are none."""
    classifier = linear_of(3).to("meta")
    batch = torch.randn(8, WIDTH, device="meta"), torch.zeros(8, dtype=torch.long, device="meta")
    align(classifier, [[batch] * 2], AlignedSettings(temperature=0.1), 1)


ALIGNED = {"data.tasks": 2, "classifier": {"name": "aligned", "epochs": 2, "samples": 16}}


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_a_run_with_alignment_lets_the_old_heads_go_on_learning(temperature, tiny: RunConfig):
    stages = run(override(tiny, ALIGNED | {"classifier.temperature": temperature}))
    first, second = (next(stages).state.classifier for _ in range(2))
    assert not torch.equal(first["heads.0.weight"], second["heads.0.weight"])
    assert {name for name in second if not name.startswith("heads.")} == {
        f"{part}/{task}" for part in ("means", "factors") for task in range(2)
    }


@pytest.fixture(scope="module")
def drawn(tiny) -> tuple[RunState, dict[str, Tensor]]:
    """A run with alignment, and the features that it has drawn."""
    *_, last = run(override(tiny, ALIGNED))
    classifier = Aligned(AlignedSettings(epochs=2, samples=16), 32)
    classifier.load_state(last.state.classifier)
    draws = {}
    for epoch in range(2):
        features, classes = Draws(0).class_features(classifier.gaussians, torch.arange(10), 16, task=1, epoch=epoch)
        draws |= {f"1/features-{epoch}": features, f"1/classes-{epoch}": classes}
    return last.state, draws


def test_features_can_be_given_in_place_of_drawn_ones(drawn, tiny, tmp_path):
    state, draws = drawn
    save_file(draws, tmp_path / "draws.safetensors")
    given = ALIGNED | {"replay.draws": tmp_path / "draws.safetensors"}
    *_, last = run(override(tiny, given))
    assert all(same_tensors(last.state.tensors[group], tensors) for group, tensors in state.tensors.items())
    assert last.state.evaluations == state.evaluations
    *_, in_steps = run(override(tiny, given | {"classifier.epochs": 7, "classifier.steps": 11}))  # two epochs of ten
    assert same_tensors(in_steps.state.classifier, state.classifier)
    save_file(draws | {"1/features-0": 2 * draws["1/features-0"]}, tmp_path / "draws.safetensors")
    *_, other = run(override(tiny, given))
    assert not same_tensors(other.state.classifier, state.classifier)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("1/features-1", lambda _: None, r"must hold 1/features-1; it holds 1/classes-0"),
        ("1/classes-1", lambda _: None, r"must hold 1/classes-1; it holds 1/classes-0"),
        ("1/features-1", lambda features: features[:, 1:], r"in 1/features-1 rows of 32 numbers .* got \(160, 31\)"),
        ("1/classes-1", lambda classes: classes + 1, r"in 1/classes-1 as many classes below 10"),
        ("1/features-2", lambda _: torch.zeros(1), r"holds 1/features-2, which this run does not ask for"),
    ],
)
def test_features_that_do_not_fit_the_run_are_refused_before_the_first_task(
    name, change, message, drawn, tiny, tmp_path
):
    draws = drawn[1] | {name: change(drawn[1].get(name))}
    save_file({n: t.contiguous() for n, t in draws.items() if t is not None}, tmp_path / "draws.safetensors")
    config = override(tiny, ALIGNED | {"replay.draws": tmp_path / "draws.safetensors"})
    with pytest.raises(ConfigError, match=f"replay.draws .*{message}") as error:
        next(run(config))
    assert len(str(error.value).splitlines()) == 1


def test_a_class_without_images_is_neither_drawn_nor_the_nearest_mean():
    """DomainNet's paintings show no t-shirt to train on: such a class has no mean to stand for it."""
    features, labels = made_up(0)
    data = data_of(0, features[labels == 1], labels[labels == 1])
    aligned, ncm = Aligned(AlignedSettings(epochs=1, samples=8), WIDTH), NCM(NCMSettings(), WIDTH)
    for classifier in (aligned, ncm):
        classifier.begin_task(data)
        learn(classifier, data)
    aligned.gaussians.append(remembered(2).gaussians[1])
    ((*batches,),) = epochs_of(aligned, 1)
    assert torch.cat([classes for _, classes in batches]).bincount().tolist() == [0, 8, 8, 8]
    logits = ncm(torch.cat([torch.zeros(1, WIDTH), features]))
    assert (logits.argmax(1) == 1).all() and torch.isfinite(logits).all()


def test_features_that_are_large_and_fewer_than_their_width_are_drawn_too():
    """Such a covariance has eigenvalues that rounding leaves below zero, by less than what is added to them."""
    cov_CDD = 300**2 * torch.cov(torch.randn(10, 64).T.double())[None]
    assert torch.linalg.cholesky_ex(cov_CDD).info.any()
    drawn = sample([Gaussians.of(torch.ones(1, 64), cov_CDD)], 4096, torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.cov(drawn.T).double(), cov_CDD[0], atol=0.1 * float(cov_CDD.max()), rtol=0)


def test_features_beyond_half_precision_stop_the_run():
    features, labels = made_up(0)
    with pytest.raises(FloatingPointError, match=r"deviation of .* too large .* try a smaller optim\.lr"):
        learn(Aligned(AlignedSettings(), WIDTH), data_of(0, features * 1e6, labels))


def test_features_that_are_no_numbers_stop_the_run_and_say_where():
    features, labels = made_up(0)
    with pytest.raises(FloatingPointError, match=r"the features after task 0 are not finite; try a smaller optim\.lr"):
        learn(Aligned(AlignedSettings(), WIDTH), data_of(0, features / 0, labels))
