"""CODA-Prompt (Smith et al., CVPR 2023, arXiv 2211.13218): prompts as weighted sums of components.

Shapes: N prompted blocks, M components, L tokens, W attention width, D width, B batch.
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from inflora.adapters.prompts.base import PromptAdapter
from inflora.config import CODAPromptSettings
from inflora.data.loader import seeded
from inflora.model import ContinualModel
from inflora.precision import products
from inflora.prompts import Encoded, Prompts, attention, make_promptable, prefixed, query


class ComponentPrompts(Prompts):
    """Per block: components P, their keys K and their attentions A; ``weight_m = cos(q * A_m, K_m)``."""

    def __init__(self, settings: CODAPromptSettings) -> None:
        super().__init__()
        self.settings = settings

    def shapes(self, vit: VisionTransformer, task: int) -> dict[str, tuple[int, ...]]:
        widths = {
            "components": self.settings.length * attention(vit, 0).attn_dim,
            "keys": vit.embed_dim,
            "attentions": vit.embed_dim,
        }
        rows = self.settings.blocks, self.settings.components
        return {f"{name}_{task}": (*rows, width) for name, width in widths.items()}

    def begin(self, vit: VisionTransformer, task: int, seed: int) -> None:
        for new, (block_count, count, width) in self.shapes(vit, task).items():
            name = new.rpartition("_")[0]
            old = self.of_tasks(name)
            blocks = [
                orthogonal_rows(
                    count,
                    torch.cat([part[block] for part in old]).detach().cpu() if old else torch.zeros(0, width),
                    seeded(seed, task, "prompts", name, block),
                )
                for block in range(block_count)
            ]
            self.learn(new, torch.stack(blocks), next(vit.parameters()))

    def forward(self, vit: VisionTransformer, images: Tensor, task: int | None = None) -> Encoded:
        """Also the paper's equation 8: ``orthogonality`` times the overlaps of P, K and A among themselves."""
        query_BD = query(vit, images).float()
        parts = [torch.cat(self.of_tasks(name), dim=1) for name in ("components", "keys", "attentions")]
        prefixes = {}
        with products("fp32", images.device):  # as in ``similarity``
            for block, (components_MLW, keys_MD, attentions_MD) in enumerate(zip(*parts, strict=True)):
                attended_BMD = nn.functional.normalize(query_BD[:, None] * attentions_MD, dim=-1)
                weights_BM = (attended_BMD * nn.functional.normalize(keys_MD, dim=-1)).sum(-1)
                prompt_BLW = (weights_BM @ components_MLW).unflatten(1, (self.settings.length, -1))
                keys_BLW, values_BLW = prompt_BLW.chunk(2, dim=1)
                prefixes[block] = (keys_BLW, values_BLW)
            penalty = torch.stack([overlap(part) for part in parts]).sum()
        with prefixed(vit, prefixes):
            return Encoded(vit(images), (self.settings.orthogonality * penalty,))


class CODAPrompt(PromptAdapter[CODAPromptSettings]):
    """Every task trains the components that it adds, with their keys and attentions; the older ones are frozen."""

    def prepare(self, model: ContinualModel) -> None:
        make_promptable(model.backbone, self.settings.blocks, "adapter.blocks")
        model.prompts = ComponentPrompts(self.settings)


def overlap(rows_NMD: Tensor) -> Tensor:
    """The mean square of the entries of ``X X^T - 1`` of each block's rows X, summed over the blocks.

    The mean, as in the authors' released code: a weight then means the same for any number of components.
    """
    gram_NMM = rows_NMD @ rows_NMD.mT
    return (gram_NMM - torch.eye(gram_NMM.shape[-1], device=gram_NMM.device)).square().mean(dim=(1, 2)).sum()


def orthogonal_rows(count: int, old_MD: Tensor, generator: torch.Generator) -> Tensor:
    """``count`` random unit rows, orthogonal to the old ones' space and to each other as far as there is room."""
    old, width = old_MD.shape
    rows = torch.randn(count, width, generator=generator)
    if old + count > width:
        return nn.functional.normalize(rows, dim=1)
    basis = torch.linalg.qr(old_MD.T).Q
    return torch.linalg.qr((rows - rows @ basis @ basis.T).T).Q.T.contiguous()
