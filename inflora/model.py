"""The continual learner's network: a backbone and one linear classifier per task."""

import torch
from torch import Tensor, nn

from inflora.lora import adapted_layers


class ContinualModel(nn.Module):
    """Frozen backbone features (B x D) and the classifiers of all tasks learnt so far, each with its own bias."""

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval()
        self.width = width
        self.heads = nn.ModuleList()

    def add_head(self, classes: int, init: str, generator: torch.Generator) -> nn.Linear:
        """A classifier for ``classes`` new classes; ``init`` "uniform" is ``nn.Linear``'s own, "zero" all zeros."""
        head = nn.Linear(self.width, classes, device="cpu")
        bound = self.width**-0.5 if init == "uniform" else 0.0
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.uniform_(-bound, bound, generator=generator) if bound else parameter.zero_()
        self.heads.append(head.to(next(self.backbone.parameters()).device))
        return head

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (B x D) after the final norm: what the classifiers see."""
        return self.backbone(images)

    def logits(self, features: Tensor) -> Tensor:
        """Logits over the classes of all tasks so far, in order of learning."""
        return torch.cat([head(features) for head in self.heads], dim=1)

    def learnt_state(self) -> dict[str, Tensor]:
        """Copies of the tensors that learning has changed: merged weights and classifiers."""
        learnt = {f"{name}.weight": layer.weight for name, layer in adapted_layers(self)}
        learnt |= {f"heads.{name}": tensor for name, tensor in self.heads.state_dict().items()}
        return {name: tensor.detach().cpu().clone() for name, tensor in learnt.items()}

    def load_learnt_state(self, state: dict[str, Tensor]) -> None:
        """Restore ``learnt_state`` onto a freshly built model; the classifiers are made as they are needed."""
        heads = sum(name.startswith("heads.") and name.endswith(".weight") for name in state)
        for index in range(heads):
            self.add_head(len(state[f"heads.{index}.bias"]), "zero", torch.Generator())
        unknown = self.load_state_dict(state, strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"the saved state does not fit this model: unexpected {', '.join(unknown)}")
