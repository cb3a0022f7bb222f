"""L2P, learning to prompt (Wang et al., CVPR 2022, arXiv 2112.08654): a pool of prompts that all tasks share.

Shapes: P prompts in the pool, L tokens of each, D width, B batch, K prompts picked.
"""

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from inflora.adapters.prompts.base import PromptAdapter, begin_at_random, similarity
from inflora.config import L2PSettings
from inflora.model import ContinualModel
from inflora.prompts import Encoded, Prompts, prepended_features, query, require_promptable


class PromptPool(Prompts):
    """Each image picks the prompts whose keys are nearest to its query, and sees them before its own tokens."""

    def __init__(self, settings: L2PSettings) -> None:
        super().__init__()
        self.settings = settings

    def shapes(self, vit: VisionTransformer, task: int) -> dict[str, tuple[int, ...]]:
        size, width = self.settings.pool, vit.embed_dim
        return {"pool_PLD": (size, self.settings.length, width), "keys_PD": (size, width)} if task == 0 else {}

    def begin(self, vit: VisionTransformer, task: int, seed: int) -> None:
        begin_at_random(self, vit, task, seed)
        self.requires_grad_(True)

    def forward(self, vit: VisionTransformer, images: Tensor, task: int | None = None) -> Encoded:
        """Also the paper's equation 5: ``pull`` times the cosine distances to the keys picked."""
        match_BP = similarity(query(vit, images), self.get_parameter("keys_PD"))
        nearest_BK, picked_BK = match_BP.topk(self.settings.top, dim=1)
        tokens_BLD = self.get_parameter("pool_PLD")[picked_BK].flatten(1, 2)
        features = prepended_features(vit, images, tokens_BLD)
        return Encoded(features, (self.settings.pull * (1 - nearest_BK).sum(1).mean(),))


class L2P(PromptAdapter[L2PSettings]):
    """Every task trains the whole pool and its keys; the classifiers see the mean of the prompts' outputs."""

    def prepare(self, model: ContinualModel) -> None:
        require_promptable(model.backbone)
        model.prompts = PromptPool(self.settings)
