"""The continual learner's network: a backbone and one linear classifier per task."""

from collections.abc import Sequence
from typing import cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from inflora.class_token import hold_weights, read_class_token_only
from inflora.config import Precision
from inflora.layout import Layout, Spec
from inflora.lora import adapted_layers
from inflora.precision import products
from inflora.prompts import Prompted, Prompts


class ContinualModel(nn.Module):
    """Frozen backbone features (B x D) and the classifiers of all tasks learnt so far, each with its own bias.

    ``prompts``, where a method has them, ask the backbone in the place of a plain call. ``precision`` is that of the
    backbone's matrix products; weights, features and all that is learnt are float32.
    """

    prompts: Prompts | None

    def __init__(self, backbone: nn.Module, width: int, precision: Precision = "fp32") -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval()
        self.width, self.precision = width, precision
        self.heads = nn.ModuleList()
        self.prompts = None
        self._pretrained = frozenset(self.state_dict())

    def settle_on(self, device: torch.device) -> None:
        """Move to the device of the run, and leave out what none of its steps needs; what is learnt stays the same.

        To be called when the method has prepared the model and what was learnt before has been restored.
        """
        self.to(device)
        if self.prompts is None:
            read_class_token_only(self.backbone)
        if self.precision == "bf16":
            hold_weights(self.backbone, torch.bfloat16)

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return next(self.backbone.parameters()).device

    @property
    def classes(self) -> int:
        """How many classes the classifiers tell apart."""
        return sum(len(head.get_parameter("bias")) for head in self.heads)

    def add_head(self, classes: int, init: str, generator: torch.Generator) -> nn.Linear:
        """A classifier for ``classes`` new classes; ``init`` "uniform" is ``nn.Linear``'s own, "zero" all zeros."""
        head = nn.Linear(self.width, classes, device="cpu")
        bound = self.width**-0.5 if init == "uniform" else 0.0
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.uniform_(-bound, bound, generator=generator) if bound else parameter.zero_()
        self.heads.append(head.to(self.device))
        return head

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (B x D) after the final norm: what the classifiers see."""
        if self.prompts is not None:
            return self.prompted(images).features
        with products(self.precision, self.device):
            features = self.backbone(images)
        return features.float()

    def prompted(self, images: Tensor, task: int | None = None) -> Prompted:
        """Features by way of the prompts, and their penalty; ``task`` is known while it is learnt."""
        assert self.prompts is not None
        with products(self.precision, self.device):
            features, penalty = self.prompts(self.backbone, images, task)
        return Prompted(features.float(), penalty.float())

    def logits(self, features: Tensor) -> Tensor:
        """Logits over the classes of all tasks so far, in order of learning."""
        return torch.cat([head(features) for head in self.heads], dim=1)

    def learnt_state(self) -> dict[str, Tensor]:
        """Copies of the tensors that learning has changed or added: merged weights, classifiers, prompts."""
        merged = {f"{name}.weight" for name, _ in adapted_layers(self)}
        state = self.state_dict()
        learnt = [name for name in state if name in merged or name not in self._pretrained]
        return {name: state[name].detach().cpu().clone() for name in learnt}

    def learnt_layout(self, sizes: Sequence[int]) -> Layout:
        """What ``learnt_state`` is after tasks of so many classes each, but for what adapters keep besides weights."""
        layout = {f"{name}.weight": Spec(tuple(layer.weight.shape)) for name, layer in adapted_layers(self)}
        for task, classes in enumerate(sizes):
            layout |= {f"heads.{task}.weight": Spec((classes, self.width)), f"heads.{task}.bias": Spec((classes,))}
            shapes = {} if self.prompts is None else self.prompts.shapes(cast(VisionTransformer, self.backbone), task)
            layout |= {f"prompts.{name}": Spec(shape) for name, shape in shapes.items()}
        return layout

    def load_learnt_state(self, state: dict[str, Tensor]) -> None:
        """Restore ``learnt_state`` onto a freshly built and prepared model; what learning has added is made anew."""
        heads = sum(name.startswith("heads.") and name.endswith(".weight") for name in state)
        for index in range(heads):
            self.add_head(len(state[f"heads.{index}.bias"]), "zero", torch.Generator())
        for name, tensor in state.items():
            self._restore(name, tensor)

    def _restore(self, name: str, tensor: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        try:
            module = self.get_submodule(path)
        except AttributeError:
            raise ValueError(f"the saved state does not fit this model: unexpected {name}") from None
        tensor = tensor.to(self.device)
        if name in self._pretrained or path.startswith("heads."):
            with torch.no_grad():
                module.get_parameter(leaf).copy_(tensor)
        elif leaf in module._buffers:
            module._buffers[leaf] = tensor.clone()
        elif path:
            module.register_parameter(leaf, nn.Parameter(tensor.clone(), requires_grad=False))
        else:
            raise ValueError(f"the saved state does not fit this model: unexpected {name}")


def joined(heads: nn.ModuleList) -> tuple[Tensor, Tensor]:
    """The weights (C x D) and biases (C) of all classifiers, in order of learning."""
    weight_CD, bias_C = (torch.cat([head.get_parameter(name) for head in heads]) for name in ("weight", "bias"))
    return weight_CD, bias_C
