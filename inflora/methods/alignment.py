"""Classifier alignment: all classifiers trained together on features drawn from every class's Gaussian.

Zhang et al., "SLCA" (ICCV 2023, arXiv 2303.05118), as InfLoRA's authors combine it with theirs (InfLoRA + CA).
Shapes: C classes of T tasks, S features drawn for each of them, N = C S in an epoch, D width, B batch.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from inflora import distributed
from inflora.config import AlignmentSettings
from inflora.data.loader import seeded
from inflora.data.order import drawn_features
from inflora.layout import Spec
from inflora.methods.base import TaskData
from inflora.methods.gaussians import Gaussians, draw
from inflora.methods.statistics import class_gaussians
from inflora.model import ContinualModel, joined

Drawn = tuple[Tensor, Tensor]
"""Features (B x D) and their classes (B), counted over all tasks in order of learning."""


class Alignment:
    """The Gaussians of all classes seen, task by task; they are kept on the CPU."""

    def __init__(self, settings: AlignmentSettings) -> None:
        self.settings = settings
        self.tasks: list[Gaussians] = []

    def after_task(self, model: ContinualModel, data: TaskData) -> None:
        """Remember the task's classes; from the second task on, align all classifiers."""
        if not self.settings.epochs:
            return
        self.tasks.append(Gaussians.of(*class_gaussians(model, data)).to("cpu"))
        if len(self.tasks) > 1:
            align(model.heads, self._epochs(model, data), self.settings)

    def _epochs(self, model: ContinualModel, data: TaskData) -> Iterator[Iterator[Drawn]]:
        """Every epoch's batches: slices of what is on the model's device already."""
        samples = self.settings.samples
        epochs = self._drawn(model.device, data) if data.draws is None else self._given(model, data)
        for features_ND, classes_N in epochs:
            yield zip(features_ND.split(samples), classes_N.split(samples), strict=True)

    def _given(self, model: ContinualModel, data: TaskData) -> Iterator[Drawn]:
        """Every epoch's features in the order in which they are given."""
        assert data.draws is not None
        for epoch in range(self.settings.epochs):
            features, classes = drawn_features(data.draws, data.task.index, epoch, model.width, model.classes)
            yield features.to(model.device), classes.to(model.device)

    def _drawn(self, device: torch.device, data: TaskData) -> Iterator[Drawn]:
        """Every epoch's features, shuffled: S of each class with images."""
        seen = torch.cat([task.has_images() for task in self.tasks]).nonzero()[:, 0]
        classes_N = seen.to(device).repeat_interleave(self.settings.samples)
        tasks = [task.with_images().to(device) for task in self.tasks]
        for epoch in range(self.settings.epochs):
            generator = seeded(data.seed, data.task.index, "alignment", epoch, device=device)
            features_ND = draw(tasks, self.settings.samples, generator)
            order_N = torch.randperm(len(classes_N), generator=generator, device=device)
            yield features_ND.index_select(0, order_N), classes_N.index_select(0, order_N)

    def state(self) -> dict[str, Tensor]:
        """What ``load_state`` takes back."""
        means = {f"means/{index}": task.mean_CD for index, task in enumerate(self.tasks)}
        return means | {f"factors/{index}": task.factor_CP for index, task in enumerate(self.tasks)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state`` gave."""
        tasks = range(len(state) // 2)
        self.tasks = [Gaussians(state[f"means/{task}"], state[f"factors/{task}"]) for task in tasks]

    def layout(self, sizes: Sequence[int], width: int) -> dict[str, Spec]:
        """What ``state`` is after tasks of so many classes each."""
        tasks = dict(enumerate(sizes if self.settings.epochs else ()))
        means = {f"means/{task}": Spec((classes, width)) for task, classes in tasks.items()}
        shape = width * (width + 1) // 2
        return means | {f"factors/{task}": Spec((classes, shape), torch.half) for task, classes in tasks.items()}


def align(heads: nn.ModuleList, epochs: Iterable[Iterable[Drawn]], settings: AlignmentSettings) -> None:
    """Train all classifiers on drawn features: SGD with momentum 0.9, one cosine over the epochs, from a fresh start.

    They are trained as one, so that a step is as long after many tasks as after two. The first worker's result is
    everyone's.
    """
    classes = [len(head.get_parameter("bias")) for head in heads]
    weight_CD, bias_C = (part.detach().requires_grad_() for part in joined(heads))
    in_task_CT = torch.block_diag(*(weight_CD.new_ones(number, 1) for number in classes))
    optimizer = torch.optim.SGD([weight_CD, bias_C], settings.lr, momentum=0.9, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.epochs)
    for batches in epochs:
        for features_BD, classes_B in batches:
            optimizer.zero_grad()
            logits_BC = nn.functional.linear(features_BD, weight_CD, bias_C)
            if settings.temperature is not None:
                logits_BC = normalised(logits_BC, in_task_CT, settings.temperature)
            nn.functional.cross_entropy(logits_BC, classes_B).backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        for name, trained in (("weight", weight_CD), ("bias", bias_C)):
            for head, part in zip(heads, distributed.from_first(trained).split(classes), strict=True):
                head.get_parameter(name).copy_(part)


def normalised(logits_BC: Tensor, in_task_CT: Tensor, temperature: float) -> Tensor:
    """All tasks' logits divided by the mean over tasks of their norms, and by ``temperature``.

    ``in_task_CT`` is 1 where a class belongs to a task, and 0 elsewhere.
    """
    # The square root is infinitely steep at zero; clamped, it is flat there, as a norm is.
    square_BT = (logits_BC.square() @ in_task_CT).clamp_min(torch.finfo(logits_BC.dtype).tiny)
    norms_B1 = (square_BT.sqrt() + 1e-7).mean(dim=1, keepdim=True)
    return logits_BC / norms_B1 / temperature
