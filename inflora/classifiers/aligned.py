"""Classifier alignment: all classifiers trained together on features drawn from every class's Gaussian.

Zhang et al., "SLCA" (ICCV 2023, arXiv 2303.05118), as InfLoRA's authors combine it with theirs (InfLoRA + CA).
Shapes: C classes of T tasks, S features drawn for each of them, N = C S in an epoch, D width, B batch.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from inflora import distributed
from inflora.classifiers.drift import drift_map
from inflora.classifiers.linear import LinearHeads
from inflora.classifiers.statistics import class_covariances, class_means
from inflora.config import AlignedSettings
from inflora.features import Features
from inflora.gaussians import Gaussians
from inflora.layout import Layout, Spec
from inflora.task_data import TaskData

Batches = Iterable[tuple[Tensor, Tensor]]
"""Features (B x D) and their classes (B), counted over all tasks in order of learning."""


class Aligned(LinearHeads[AlignedSettings]):
    """Linear heads, and the Gaussians of all classes seen, task by task; those are kept on the CPU."""

    is_fitted = True

    def __init__(self, settings: AlignedSettings, width: int) -> None:
        super().__init__(settings, width)
        self.gaussians: list[Gaussians] = []

    @property
    def follows_drift(self) -> bool:
        return self.settings.drift is not None

    @property
    def views(self) -> int:
        return self.settings.views

    def fit(self, seen: Features, before: Features | None, data: TaskData) -> None:
        """Let old classes follow the features, remember the task's; from the second task on, align all heads."""
        if before is not None and self.settings.drift is not None:
            map_DD = drift_map(before.features_ND, seen.features_ND, self.settings.drift)
            self.gaussians = [task.to(map_DD.device).carried(map_DD).to("cpu") for task in self.gaussians]
        count_C, mean_CD = class_means(seen)
        self.gaussians.append(Gaussians.of(mean_CD, class_covariances(seen, count_C, mean_CD)).to("cpu"))
        if len(self.gaussians) > 1:
            classes = sum(int(task.has_images().sum()) for task in self.gaussians)
            align(self, self._epochs(data), self.settings, self.settings.epochs_of(classes))

    def _epochs(self, data: TaskData) -> Iterator[Batches]:
        """Every epoch's batches: slices of what is on the model's device already."""
        device, samples = data.input_format.device, self.settings.samples
        seen_C = torch.cat([task.has_images() for task in self.gaussians]).nonzero()[:, 0].to(device)
        gaussians = [task.with_images().to(device) for task in self.gaussians]
        for epoch in range(self.settings.epochs_of(len(seen_C))):
            drawn = data.draws.class_features(gaussians, seen_C, samples, data.task.index, epoch)
            yield zip(*(part.split(samples) for part in drawn), strict=True)

    def state(self) -> dict[str, Tensor]:
        means = {f"means/{index}": task.mean_CD for index, task in enumerate(self.gaussians)}
        return super().state() | means | {f"factors/{i}": task.factor_CP for i, task in enumerate(self.gaussians)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        tasks = range(len(self.heads))
        self.gaussians = [Gaussians(state[f"means/{task}"], state[f"factors/{task}"]) for task in tasks]

    def layout(self, sizes: Sequence[int]) -> Layout:
        triangle = self.width * (self.width + 1) // 2
        means = {f"means/{task}": Spec((classes, self.width)) for task, classes in enumerate(sizes)}
        factors = {f"factors/{task}": Spec((classes, triangle), torch.half) for task, classes in enumerate(sizes)}
        return {**super().layout(sizes), **means, **factors}


def align(classifier: LinearHeads, epochs: Iterable[Batches], settings: AlignedSettings, total: int) -> None:
    """Train all classifiers on drawn features: SGD with momentum 0.9, one cosine over ``total`` epochs, afresh.

    They are trained as one, so that a step is as long after many tasks as after two. The first worker's result is
    everyone's.
    """
    classes = [len(head.get_parameter("bias")) for head in classifier.heads]
    weight_CD, bias_C = (part.detach().requires_grad_() for part in classifier.joined())
    in_task_CT = torch.block_diag(*(weight_CD.new_ones(number, 1) for number in classes))
    optimizer = torch.optim.SGD([weight_CD, bias_C], settings.lr, momentum=0.9, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)
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
            for head, part in zip(classifier.heads, distributed.broadcast(trained).split(classes), strict=True):
                head.get_parameter(name).copy_(part)


def normalised(logits_BC: Tensor, in_task_CT: Tensor, temperature: float) -> Tensor:
    """All tasks' logits divided by the mean over tasks of their norms, and by ``temperature``.

    ``in_task_CT`` is 1 where a class belongs to a task, and 0 elsewhere.
    """
    # The square root is infinitely steep at zero; clamped, it is flat there, as a norm is.
    square_BT = (logits_BC.square() @ in_task_CT).clamp_min(torch.finfo(logits_BC.dtype).tiny)
    norms_B1 = (square_BT.sqrt() + 1e-7).mean(dim=1, keepdim=True)
    return logits_BC / norms_B1 / temperature
