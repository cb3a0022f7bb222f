"""Classifier alignment: Gaussians of the classes' features, what is drawn from them, and what it does to a run."""

import math
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from inflora.config import AlignmentSettings, ConfigError, NCMSettings, RunConfig, override
from inflora.continual import run
from inflora.data.loader import Batch
from inflora.data.stream import Task
from inflora.methods import make_method
from inflora.methods.alignment import Alignment, Drawn, align, normalised
from inflora.methods.base import TaskData
from inflora.methods.gaussians import Gaussians, draw
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


def test_covariances_keep_six_digits_where_features_vary_by_a_ten_thousandth_of_their_means():
    features, labels = made_up(0, 400)
    _, cov_CDD = class_gaussians(identity_model(), data_of(0, features + 1000, labels))
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
    mean_CD, cov_CDD = class_gaussians(identity_model(), data_of(0, *made_up(0)))
    means, covs = torch.cat([mean_CD, mean_CD + 1]), torch.cat([cov_CDD, 2 * cov_CDD])
    tasks = [Gaussians.of(means[:2], covs[:2]), Gaussians.of(means[2:], covs[2:])]
    drawn = draw(tasks, 20_000, torch.Generator().manual_seed(0)).split(20_000)
    assert len(drawn) == 4
    for c, features in enumerate(drawn):
        torch.testing.assert_close(features.mean(0), [0.95, 1.0][c // 2] * means[c].float(), atol=5e-3, rtol=0)
        ridge = covs[c].float() + 1e-4 * torch.eye(WIDTH)
        torch.testing.assert_close(torch.cov(features.T), ridge, atol=1e-3, rtol=0)


def remembered(tasks: int, samples: int = 8, epochs: int = 1) -> Alignment:
    """An alignment after so many tasks of two made-up classes each."""
    alignment = Alignment(AlignmentSettings(epochs=epochs, samples=samples))
    for index in range(tasks):
        alignment.tasks.append(Gaussians.of(*class_gaussians(identity_model(), data_of(index, *made_up(index)))))
    return alignment


def epochs_of(alignment: Alignment, task: int, seed: int = 0) -> list[list[Drawn]]:
    data = data_of(task, *made_up(task))._replace(seed=seed)
    return [list(batches) for batches in alignment._epochs(identity_model(task + 1), data)]


def test_an_epoch_is_one_batch_for_each_class_and_shuffles_what_it_draws():
    for batches in epochs_of(remembered(2, samples=8, epochs=2), task=1):
        assert [features.shape for features, _ in batches] == [(8, WIDTH)] * 4
        classes = torch.cat([classes for _, classes in batches])
        assert classes.bincount().tolist() == [8] * 4
        assert not torch.equal(classes, classes.sort().values)


def test_every_epoch_task_and_seed_draws_features_of_its_own_and_the_same_again():
    alignment, one = remembered(3, epochs=2), (2, 0)
    drawn = {key: epochs_of(alignment, *key) for key in ((2, 0), (1, 0), (2, 1))}
    firsts = [epoch[0][0] for epochs in drawn.values() for epoch in epochs]
    assert all(not torch.equal(a, b) for i, a in enumerate(firsts) for b in firsts[:i])
    assert torch.equal(epochs_of(alignment, *one)[1][0][0], drawn[one][1][0][0])


def test_the_gaussians_are_restored_as_they_were():
    alignment, restored = remembered(2), Alignment(AlignmentSettings(epochs=1))
    restored.load_state(alignment.state())
    for ours, theirs in zip(restored.tasks, alignment.tasks, strict=True):
        assert all(map(torch.equal, ours, theirs))


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


def test_classifiers_that_are_trained_together_learn_what_each_would_beside_the_others():
    """Against one parameter for each, and the norms of their logits one by one."""
    heads = identity_model(3).heads
    expected = [parameter.detach().clone().requires_grad_() for parameter in heads.parameters()]
    features, classes = torch.randn(16, WIDTH), torch.arange(16) % 6
    align(heads, [[(features, classes)] * 3], AlignmentSettings(epochs=1, lr=0.1, temperature=0.1))
    optimizer = torch.optim.SGD(expected, lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(3):
        logits = [features @ w.T + b for w, b in zip(expected[::2], expected[1::2], strict=True)]
        norms = sum(part.norm(dim=1, keepdim=True) for part in logits) / 3
        optimizer.zero_grad()
        nn.functional.cross_entropy(torch.cat(logits, dim=1) / norms / 0.1, classes).backward()
        optimizer.step()
    torch.testing.assert_close(list(heads.parameters()), expected, check_stride=False)


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
    settings = AlignmentSettings(epochs=1, temperature=temperature)

    def operations(tasks: int, steps: int) -> Counter[str]:
        batch = torch.randn(8, WIDTH), torch.arange(8) % (2 * tasks)
        with Operations() as operations:
            align(identity_model(tasks).heads, [[batch] * steps], settings)
        return operations.seen

    of_a_step = {tasks: operations(tasks, 3) - operations(tasks, 2) for tasks in (2, 10)}
    assert of_a_step[2] == of_a_step[10]
    assert 20 < of_a_step[10].total() < 70


MAKE_THE_HOST_WAIT = {"_local_scalar_dense", "nonzero", "equal", "index", "masked_select", "lift_fresh"}
"""``index``: by a mask, perhaps."""


def test_no_epoch_waits_for_the_device():
    """What must be asked is asked before the first."""
    alignment, model = remembered(3, epochs=2), identity_model(3)

    def watched() -> Iterator[Iterator[Drawn]]:
        epochs = alignment._epochs(model, data_of(2, *made_up(2)))
        yield next(epochs)
        with Operations() as operations:
            yield from epochs
        assert "randn" in operations.seen and operations.seen.keys().isdisjoint(MAKE_THE_HOST_WAIT)

    align(model.heads, watched(), AlignmentSettings(epochs=2, temperature=0.1))


def test_no_step_needs_a_number_that_it_has_computed():
    """As where there are none."""
    heads = identity_model(3).heads.to("meta")
    batch = torch.randn(8, WIDTH, device="meta"), torch.zeros(8, dtype=torch.long, device="meta")
    align(heads, [[batch] * 2], AlignmentSettings(epochs=1, temperature=0.1))


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_a_run_with_alignment_lets_the_old_classifiers_go_on_learning(temperature, tiny: RunConfig):
    alignment = {"epochs": 2, "samples": 16, "temperature": temperature}
    stages = run(override(tiny, {"data.tasks": 2, "method.classifier_alignment": alignment}))
    first, second = (next(stages).state for _ in range(2))
    assert not torch.equal(first.model["heads.0.weight"], second.model["heads.0.weight"])
    assert {name for name in second.method if name.startswith("classes/")} == {
        f"classes/{part}/{task}" for part in ("means", "factors") for task in range(2)
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
    for epoch, batches in enumerate(alignment._drawn(torch.device("cpu"), data_of(1, *made_up(1)))):
        draws |= dict(zip((f"1/features-{epoch}", f"1/classes-{epoch}"), batches, strict=True))
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
    alignment.tasks.append(remembered(2).tasks[1])
    ((*batches,),) = epochs_of(alignment, 1)
    assert torch.cat([classes for _, classes in batches]).bincount().tolist() == [0, 8, 8, 8]
    make_method(NCMSettings()).end_task(model, data)
    logits = model.logits(torch.cat([torch.zeros(1, WIDTH), features]))
    assert (logits.argmax(1) == 1).all() and torch.isfinite(logits).all()


def test_features_that_are_large_and_fewer_than_their_width_are_drawn_too():
    """Such a covariance has eigenvalues that rounding leaves below zero, by less than what is added to them."""
    cov_CDD = 300**2 * torch.cov(torch.randn(10, 64).T.double())[None]
    assert torch.linalg.cholesky_ex(cov_CDD).info.any()
    drawn = draw([Gaussians.of(torch.ones(1, 64), cov_CDD)], 4096, torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.cov(drawn.T).double(), cov_CDD[0], atol=0.1 * float(cov_CDD.max()), rtol=0)


def test_features_beyond_half_precision_stop_the_run():
    features, labels = made_up(0)
    with pytest.raises(FloatingPointError, match=r"variance .* too large .* try a smaller optim\.lr"):
        Alignment(AlignmentSettings(epochs=1)).after_task(identity_model(1), data_of(0, features * 1e6, labels))


def test_features_that_are_no_numbers_stop_the_run_and_say_where():
    features, labels = made_up(0)
    with pytest.raises(FloatingPointError, match=r"the features after task 0 are not finite; try a smaller optim\.lr"):
        Alignment(AlignmentSettings(epochs=1)).after_task(identity_model(1), data_of(0, features / 0, labels))
