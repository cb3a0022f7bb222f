"""DualPrompt (Wang et al., ECCV 2022, arXiv 2204.04799): general prompts for all tasks, expert prompts for each.

Shapes: G, E blocks with general and expert prompts, L tokens, W attention width, D width, B batch, T tasks.
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from inflora.adapters.prompts.base import PromptAdapter, begin_at_random, similarity
from inflora.config import DualPromptSettings
from inflora.model import ContinualModel
from inflora.prompts import Encoded, Prompts, attention, make_promptable, prefixed, query


class DualPrompts(Prompts):
    """Prefixes of keys and values: the general ones always, and those of the task whose key is nearest."""

    def __init__(self, settings: DualPromptSettings) -> None:
        super().__init__()
        self.settings = settings

    def shapes(self, vit: VisionTransformer, task: int) -> dict[str, tuple[int, ...]]:
        settings, width = self.settings, attention(vit, 0).attn_dim
        general = (settings.general_blocks, 2, settings.general_length, width)
        expert = (settings.expert_blocks, 2, settings.expert_length, width)
        own: dict[str, tuple[int, ...]] = {f"expert_{task}": expert, f"key_{task}": (vit.embed_dim,)}
        return {"general_G2LW": general} | own if task == 0 and settings.general_blocks else own

    def begin(self, vit: VisionTransformer, task: int, seed: int) -> None:
        begin_at_random(self, vit, task, seed)
        if self.settings.general_blocks:
            self.get_parameter("general_G2LW").requires_grad_(True)

    def forward(self, vit: VisionTransformer, images: Tensor, task: int | None = None) -> Encoded:
        """Also the paper's matching loss: ``pull`` times the cosine distance to the key of the task being learnt."""
        match_BT = similarity(query(vit, images), torch.stack(self.of_tasks("key")))
        chosen_B = match_BT.argmax(1) if task is None else torch.full_like(match_BT[:, 0], task, dtype=torch.int64)
        expert_BE2LW = torch.stack(self.of_tasks("expert"))[chosen_B]
        first = self.settings.general_blocks
        general = self.get_parameter("general_G2LW") if first else ()
        prefixes = {block: (keys_LW, values_LW) for block, (keys_LW, values_LW) in enumerate(general)}
        prefixes |= {
            first + block: (expert_BE2LW[:, block, 0], expert_BE2LW[:, block, 1])
            for block in range(self.settings.expert_blocks)
        }
        distance = 1 - match_BT.gather(1, chosen_B[:, None]).mean()
        with prefixed(vit, prefixes):
            return Encoded(vit(images), (self.settings.pull * distance,))


class DualPrompt(PromptAdapter[DualPromptSettings]):
    """Every task trains the general prompts, and its own expert prompts with their key."""

    def prepare(self, model: ContinualModel) -> None:
        total = self.settings.general_blocks + self.settings.expert_blocks
        make_promptable(model.backbone, total, "adapter.general_blocks + adapter.expert_blocks")
        model.prompts = DualPrompts(self.settings)
