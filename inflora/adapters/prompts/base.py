"""Common to the prompt adapters: training, the beginning of prompts, matching them with images."""

from typing import TypeVar, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from inflora.adapters.base import Adapter
from inflora.config import PromptSettings
from inflora.data.loader import seeded
from inflora.model import ContinualModel
from inflora.precision import products
from inflora.prompts import Prompts
from inflora.task_data import TaskData

S = TypeVar("S", bound=PromptSettings)

MATCHED = ("key", "attentions")
"""How the names begin of what is compared with an image's query; all else is shown to the backbone."""


class PromptAdapter(Adapter[S]):
    """The backbone stays as it is; prompts are trained. A subclass says which prompts."""

    is_trained = True

    def begin_task(self, model: ContinualModel, data: TaskData) -> None:
        assert model.prompts is not None
        model.prompts.requires_grad_(False)
        model.prompts.begin(cast(VisionTransformer, model.backbone), data.task.index, data.draws.seed)

    def task_parameters(self, model: ContinualModel) -> list[nn.Parameter]:
        assert model.prompts is not None
        return [parameter for parameter in model.prompts.parameters() if parameter.requires_grad]

    def own_rates(self, model: ContinualModel) -> dict[nn.Parameter, float]:
        """Those of ``key_lr`` and ``prompt_lr``, where they are set."""
        assert model.prompts is not None
        settings, rates = self.settings, {}
        for name, parameter in model.prompts.named_parameters():
            rate = settings.key_lr if name.startswith(MATCHED) else settings.prompt_lr
            if rate is not None:
                rates[parameter] = rate
        return rates


def begin_at_random(prompts: Prompts, vit: VisionTransformer, task: int, seed: int) -> None:
    """Add a task's parameters: normal, standard deviation 0.02, as a vision transformer's own tokens."""
    for name, shape in prompts.shapes(vit, task).items():
        generator = seeded(seed, task, "prompts", name.rpartition("_")[0])
        prompts.learn(name, 0.02 * torch.randn(shape, generator=generator), next(vit.parameters()))


def similarity(query_BD: Tensor, keys_KD: Tensor) -> Tensor:
    """Cosine of every image's query with every key (B x K), in float32 whatever the backbone's products are.

    Rounded to bfloat16, near keys would be equally near.
    """
    with products("fp32", query_BD.device):
        return nn.functional.normalize(query_BD.float(), dim=1) @ nn.functional.normalize(keys_KD, dim=1).T
