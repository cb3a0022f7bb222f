"""What the prompt methods share: how they are trained, how prompts start, and how they are matched with images."""

from typing import TypeVar, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from inflora.config import Settings
from inflora.data.loader import Batch, seeded
from inflora.data.stream import Task
from inflora.methods.base import Method, TaskData, Trainable, task_loss
from inflora.model import ContinualModel
from inflora.prompts import Prompts

S = TypeVar("S", bound=Settings)


class PromptMethod(Method[S]):
    """The backbone stays as it is; prompts and classifiers are trained. A subclass says which prompts."""

    def begin_task(self, model: ContinualModel, data: TaskData) -> None:
        assert model.prompts is not None
        model.prompts.requires_grad_(False)
        model.prompts.begin(cast(VisionTransformer, model.backbone), data.task.index, data.seed)

    def trainable(self, model: ContinualModel) -> Trainable:
        assert model.prompts is not None
        prompts = [parameter for parameter in model.prompts.parameters() if parameter.requires_grad]
        return Trainable(list(model.heads[-1].parameters()), prompts)

    def loss(self, model: ContinualModel, batch: Batch, task: Task) -> Tensor:
        """Cross-entropy over the current task's classes, plus what the prompts add."""
        features, penalty = model.prompted(batch.images, task.index)
        return task_loss(model, features, batch, task) + penalty


def begin_at_random(prompts: Prompts, vit: VisionTransformer, task: int, seed: int) -> None:
    """Add a task's parameters: normal, standard deviation 0.02, as a vision transformer's own tokens."""
    for name, shape in prompts.shapes(vit, task).items():
        generator = seeded(seed, task, "prompts", name.rpartition("_")[0])
        prompts.learn(name, 0.02 * torch.randn(shape, generator=generator), next(vit.parameters()))


def similarity(query_BD: Tensor, keys_KD: Tensor) -> Tensor:
    """Cosine of every image's query with every key (B x K)."""
    return nn.functional.normalize(query_BD, dim=1) @ nn.functional.normalize(keys_KD, dim=1).T
