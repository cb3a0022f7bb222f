"""The last block of a vision transformer whose class token alone is read: nothing is computed for the other tokens
but their keys and values.

Plain timm computes queries, everything after the attention and the whole MLP for all of them: about a twelfth of the
forward and backward of a model with 12 blocks. The class token's numbers are the same.

Shapes: B batch, N tokens, D width, H heads, E width of a head.
"""

from typing import cast

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from inflora.lora import LoRALinear, adapted_layers


def finish_attention(attention: Attention, attended_BHNE: Tensor, read_BND: Tensor) -> Tensor:
    """Do as timm's attention does with attended values, for the tokens whose input ``read_BND`` is."""
    merged_BND = attention.norm(attended_BHNE.transpose(1, 2).flatten(2))
    if attention.gate is not None:
        merged_BND = merged_BND * attention.gate(read_BND).sigmoid()
    return attention.proj_drop(attention.proj(merged_BND))


class ClassTokenBlock(Block):
    """timm's block, for the class token's output (B x 1 x D) alone."""

    def __init__(self, plain: Block) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(plain.__dict__)  # the same submodules, under the same names

    def forward(self, x_BND: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        assert attn_mask is None and not is_causal
        token_B1D = x_BND[:, :1]
        token_B1D = token_B1D + self.drop_path1(self.ls1(self._attention(self.norm1(x_BND))))
        return token_B1D + self.drop_path2(self.ls2(self.mlp(self.norm2(token_B1D))))

    def _attention(self, read_BND: Tensor) -> Tensor:
        attention = cast(Attention, self.attn)
        queries, keys_and_values = slice(0, attention.attn_dim), slice(attention.attn_dim, 3 * attention.attn_dim)
        if isinstance(attention.qkv, LoRALinear):
            kv = attention.qkv(read_BND, outputs=keys_and_values)
            # Not as a module: whoever watches what ``qkv`` reads has seen this token among the others.
            q = attention.qkv.forward(read_BND[:, :1], outputs=queries)
        else:
            kv = _outputs(attention.qkv, read_BND, keys_and_values)
            q = _outputs(attention.qkv, read_BND[:, :1], queries)
        heads = (attention.num_heads, attention.head_dim)
        k, v = kv.unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
        q, k = attention.q_norm(q.unflatten(-1, heads).transpose(1, 2)), attention.k_norm(k)
        attended_BH1E = nn.functional.scaled_dot_product_attention(q, k, v)
        return finish_attention(attention, attended_BH1E, read_BND[:, :1])


def _outputs(layer: nn.Linear, x: Tensor, outputs: slice) -> Tensor:
    return nn.functional.linear(x, layer.weight[outputs], None if layer.bias is None else layer.bias[outputs])


def read_class_token_only(vit: nn.Module) -> None:
    """Put a ``ClassTokenBlock`` in the place of the last block, in place, where that changes no number.

    It would where other tokens are pooled, and where layers behind the attention are adapted: their inputs'
    covariances are those of all tokens.
    """
    # Exactly this class: of its subclasses, distilled models read another token too.
    if type(vit) is not VisionTransformer or vit.global_pool != "token" or vit.attn_pool is not None:
        return
    last = vit.blocks[-1]
    if type(last) is not Block or type(last.attn) is not Attention:
        return
    if all(name == "attn.qkv" for name, _ in adapted_layers(last)):
        vit.blocks[-1] = ClassTokenBlock(last)


def hold_weights(vit: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights that products read in ``dtype``, in place, in the place of casting them in every step.

    Adaptable layers keep their float32 weights beside it: updates are merged into those. The products are the same.
    """
    for module in vit.modules():
        if isinstance(module, LoRALinear):
            module.hold(dtype)
        elif type(module) in (nn.Linear, nn.Conv2d):  # subclasses may compute with their weights before they multiply
            module.to(dtype)
