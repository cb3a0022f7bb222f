"""Classifier alignment: Gaussians of the classes' features, what is drawn from them, and what it does to a run."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from inflora.config import AlignmentSettings, ConfigError, NCMSettings, RunConfig, override
from inflora.continual import run
from inflora.data.loader import Batch, seeded
from inflora.data.stream import Task
from inflora.methods import make_method
from inflora.methods.alignment import Alignment, align, normalised
from inflora.methods.base import TaskData
from inflora.methods.statistics import class_gaussians, class_means
from inflora.model import ContinualModel
from inflora.state import RunState
from tests.conftest import same_tensors

WIDTH = 4


def identity_model(heads: int = 0) -> ContinualModel:
    """A model whose features are its inputs."""
    backbone = nn.Linear(WIDTH, WIDTH, bias=False)
    nn.init.eye_(backbone.weight)
    model = ContinualModel(backbone, WIDTH)
    for index in range(heads):
        model.add_head(2, "uniform", torch.Generator().manual_seed(index))
    return model


def data_of(index: int, features: Tensor, labels: Tensor) -> TaskData:
    """A task of two classes whose images are features already, in batches of uneven size."""

    def plain():
        for rows in torch.arange(len(labels)).split(7):
            yield Batch(features[rows], labels[rows], len(rows) / len(labels))

    task = Task(index, 2 * index, ("a", "b"), torch.arange(len(labels)), torch.arange(0))
    return TaskData(task, 3, 0, lambda _: plain(), plain)


def made_up(index: int, count: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    labels = 2 * index + torch.arange(count) % 2
    return torch.randn(count, WIDTH, generator=generator) * 0.1 + torch.eye(WIDTH)[labels % WIDTH], labels


def test_means_and_covariances_are_those_of_each_classs_features():
    features, labels = made_up(1)
    mean_CD, cov_CDD = class_gaussians(identity_model(), data_of(1, features, labels))
    for c in range(2):
        own = features[labels == 2 + c].double()
        torch.testing.assert_close(mean_CD[c], own.mean(0))
        torch.testing.assert_close(cov_CDD[c], torch.cov(own.T))
    torch.testing.assert_close(class_means(identity_model(), data_of(1, features, labels)), mean_CD)


def test_a_class_with_one_image_or_none_has_no_covariance():
    mean_CD, cov_CDD = class_gaussians(identity_model(), data_of(0, torch.ones(1, WIDTH), torch.zeros(1).long()))
    assert torch.equal(mean_CD, torch.stack([torch.ones(WIDTH), torch.zeros(WIDTH)]).double())
    assert not cov_CDD.any()


def test_without_epochs_nothing_is_remembered():
    alignment = Alignment(AlignmentSettings())
    alignment.after_task(identity_model(1), data_of(0, *made_up(0)))
    assert alignment.state() == {}


def test_the_first_task_is_remembered_and_the_second_aligns_every_classifier():
    model, alignment = identity_model(1), Alignment(AlignmentSettings(epochs=2))
    before = model.heads[0].weight.clone()
    alignment.after_task(model, data_of(0, *made_up(0)))
    assert torch.equal(model.heads[0].weight, before)
    model.add_head(2, "uniform", torch.Generator())
    newer = model.heads[1].bias.clone()
    alignment.after_task(model, data_of(1, *made_up(1)))
    assert not torch.equal(model.heads[0].weight, before)
    assert not torch.equal(model.heads[1].bias, newer)
    assert all(parameter.grad is None for parameter in model.heads.parameters())


def test_drawn_features_have_the_classes_moments_with_older_means_shrunk_more():
    alignment = Alignment(AlignmentSettings(epochs=1, samples=20_000))
    model = identity_model(2)
    alignment.after_task(model, data_of(0, *made_up(0)))
    alignment.means.append(alignment.means[0] + 1)
    alignment.covs.append(2 * alignment.covs[0])
    batches = list(alignment._draw(alignment._roots(), torch.Generator().manual_seed(0), torch.device("cpu")))
    assert [len(classes) for _, classes in batches] == [20_000] * 4
    features, classes = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for c in range(4):
        drawn, (task, own) = features[classes == c], divmod(c, 2)
        assert len(drawn) == 20_000
        shrink = [0.95, 1.0][task]
        torch.testing.assert_close(drawn.mean(0), shrink * alignment.means[task][own], atol=5e-3, rtol=0)
        ridge = alignment.covs[task][own] + 1e-4 * torch.eye(WIDTH)
        torch.testing.assert_close(torch.cov(drawn.T), ridge, atol=1e-3, rtol=0)


def test_the_gaussians_are_restored_as_they_were():
    alignment, restored = Alignment(AlignmentSettings(epochs=1)), Alignment(AlignmentSettings(epochs=1))
    for index in range(2):
        alignment.after_task(identity_model(2), data_of(index, *made_up(index)))
    restored.load_state(alignment.state())
    for ours, theirs in zip(restored.means + restored.covs, alignment.means + alignment.covs, strict=True):
        assert torch.equal(ours, theirs)


def test_alignment_steps_are_those_of_sgd_with_momentum_decay_and_a_cosine():
    """Against the update written out, in float64."""
    settings = AlignmentSettings(epochs=3, lr=0.1, weight_decay=0.01)
    head = nn.Linear(2, 3, dtype=torch.float64)
    features, classes = torch.randn(5, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
    speed_W, speed_b = torch.zeros_like(weight), torch.zeros_like(bias)
    align(nn.ModuleList([head]), [[(features, classes)] * 2] * 3, settings)
    for epoch in range(3):
        for _ in range(2):
            error = (features @ weight.T + bias).softmax(1) - nn.functional.one_hot(classes, 3)
            speed_W = 0.9 * speed_W + error.T @ features / 5 + 0.01 * weight
            speed_b = 0.9 * speed_b + error.mean(0) + 0.01 * bias
            rate = 0.1 * (1 + math.cos(math.pi * epoch / 3)) / 2
            weight, bias = weight - rate * speed_W, bias - rate * speed_b
    torch.testing.assert_close(head.weight.detach(), weight)
    torch.testing.assert_close(head.bias.detach(), bias)


def test_normalised_logits_are_divided_by_the_mean_norm_of_the_tasks_logits():
    first, second = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0, 15.0]])
    torch.testing.assert_close(
        normalised([first, second], 0.1), torch.tensor([[3.0, 4.0, 0.0, 0.0, 15.0]]) / 10 / 0.1, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_a_run_with_alignment_lets_the_old_classifiers_go_on_learning(temperature, tiny: RunConfig):
    alignment = {"epochs": 2, "samples": 16, "temperature": temperature}
    stages = run(override(tiny, {"data.tasks": 2, "method.classifier_alignment": alignment}))
    first, second = (next(stages).state for _ in range(2))
    assert not torch.equal(first.model["heads.0.weight"], second.model["heads.0.weight"])
    assert {name for name in second.method if name.startswith("classes/")} == {
        f"classes/{part}/{task}" for part in ("means", "covariances") for task in range(2)
    }


ALIGNED = {"data.tasks": 2, "method.classifier_alignment": {"epochs": 2, "samples": 16}}


@pytest.fixture(scope="module")
def drawn(tiny) -> tuple[RunState, dict[str, Tensor]]:
    """A run with alignment, and the features that it has drawn."""
    *_, last = run(override(tiny, ALIGNED))
    alignment = Alignment(AlignmentSettings(epochs=2, samples=16))
    alignment.load_state(
        {name.removeprefix("classes/"): t for name, t in last.state.method.items() if "classes" in name}
    )
    draws = {}
    for epoch in range(2):
        batches = alignment._draw(alignment._roots(), seeded(0, 1, "alignment", epoch), torch.device("cpu"))
        features, classes = (torch.cat(parts) for parts in zip(*batches, strict=True))
        draws |= {f"1/features-{epoch}": features, f"1/classes-{epoch}": classes}
    return last.state, draws


def test_features_can_be_given_in_place_of_drawn_ones(drawn, tiny, tmp_path):
    state, draws = drawn
    save_file(draws, tmp_path / "draws.safetensors")
    given = ALIGNED | {"method.classifier_alignment.draws": tmp_path / "draws.safetensors"}
    *_, last = run(override(tiny, given))
    assert same_tensors(last.state.model, state.model)
    assert last.state.evaluations == state.evaluations
    save_file(draws | {"1/features-0": 2 * draws["1/features-0"]}, tmp_path / "draws.safetensors")
    *_, other = run(override(tiny, given))
    assert not same_tensors(other.state.model, state.model)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("1/features-1", lambda _: None, r"must hold 1/features-1; it holds 1/classes-0"),
        ("1/classes-1", lambda _: None, r"must hold 1/classes-1; it holds 1/classes-0"),
        ("1/features-1", lambda features: features[:, 1:], r"in 1/features-1 rows of 32 numbers .* got \(160, 31\)"),
        ("1/classes-1", lambda classes: classes + 1, r"in 1/classes-1 as many classes below 10"),
    ],
)
def test_features_that_do_not_fit_the_run_are_refused_before_the_first_task(
    name, change, message, drawn, tiny, tmp_path
):
    draws = drawn[1] | {name: change(drawn[1][name])}
    save_file({n: t.contiguous() for n, t in draws.items() if t is not None}, tmp_path / "draws.safetensors")
    config = override(tiny, ALIGNED | {"method.classifier_alignment.draws": tmp_path / "draws.safetensors"})
    with pytest.raises(ConfigError, match=message) as error:
        next(run(config))
    assert len(str(error.value).splitlines()) == 1


def test_a_class_without_images_is_neither_drawn_nor_the_nearest_mean():
    """DomainNet's paintings show no t-shirt to train on: such a class has no mean to stand for it."""
    features, labels = made_up(0)
    data = data_of(0, features[labels == 1], labels[labels == 1])
    alignment, model = Alignment(AlignmentSettings(epochs=1, samples=8)), identity_model(1)
    alignment.after_task(model, data)
    alignment.means.append(alignment.means[0] + 1)
    alignment.covs.append(alignment.covs[0])
    drawn = alignment._draw(alignment._roots(), torch.Generator().manual_seed(0), torch.device("cpu"))
    assert torch.cat([classes for _, classes in drawn]).bincount().tolist() == [0, 8, 8, 8]
    make_method(NCMSettings()).end_task(model, data)
    logits = model.logits(torch.cat([torch.zeros(1, WIDTH), features]))
    assert (logits.argmax(1) == 1).all() and torch.isfinite(logits).all()


def test_features_that_are_large_and_fewer_than_their_width_are_drawn_too():
    """Rounded to float32 such a covariance has eigenvalues further below zero than what is added to it."""
    generator = torch.Generator().manual_seed(0)
    features = 300 * torch.randn(10, 64, generator=generator)
    alignment, cov_DD = Alignment(AlignmentSettings(epochs=1, samples=4096)), torch.cov(features.T)
    assert torch.linalg.cholesky_ex(cov_DD.double() + 1e-4 * torch.eye(64)).info > 0
    alignment.means, alignment.covs = [torch.ones(1, 64)], [cov_DD[None]]
    ((drawn, _),) = alignment._draw(alignment._roots(), generator, torch.device("cpu"))
    torch.testing.assert_close(torch.cov(drawn.T), cov_DD, atol=0.1 * float(cov_DD.max()), rtol=0)


def test_features_that_are_no_numbers_stop_the_run_and_say_where():
    features, labels = made_up(0)
    with pytest.raises(FloatingPointError, match=r"the features after task 0 are not finite; try a smaller optim\.lr"):
        Alignment(AlignmentSettings(epochs=1)).after_task(identity_model(1), data_of(0, features / 0, labels))
