"""The continual learner's network: a backbone that an adapter changes, and a classifier of its features."""

import copy
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from inflora.class_token import hold_weights, read_class_token_only
from inflora.classifiers import Classifier
from inflora.config import Precision
from inflora.layout import Layout, Spec
from inflora.lora import adapted_layers, make_plain
from inflora.precision import products
from inflora.prompts import Encoded, Prompts


class ContinualModel(nn.Module):
    """Features (B x D) of a backbone that an adapter changes, and a classifier of them.

    Forward gives logits over all classes so far. ``prompts``, where an adapter has them, ask the backbone in the place
    of a plain call. ``precision`` is that of the backbone's matrix products; weights, features and all that is learnt
    are float32.
    """

    prompts: Prompts | None

    def __init__(self, backbone: nn.Module, classifier: Classifier[Any], precision: Precision = "fp32") -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval()
        self._pretrained = frozenset(self.state_dict())
        self.classifier, self.width, self.precision = classifier, classifier.width, precision
        self.prompts = None
        self.frozen: nn.Module | None = None

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.classifier(self.features(images)))

    def settle_on(self, device: torch.device) -> None:
        """Move to the device of the run, and leave out what none of its steps needs; what is learnt stays the same.

        To be called when the adapter has prepared the model and what was learnt before has been restored.
        """
        self.to(device)
        for backbone in (self.backbone, *([] if self.frozen is None else [self.frozen])):
            if self.prompts is None or backbone is self.frozen:
                read_class_token_only(backbone)
            if self.precision == "bf16":
                hold_weights(backbone, torch.bfloat16)

    def keep_frozen(self) -> None:
        """Keep the backbone as it is now beside the one that learns: features are then both's, side by side.

        To be called when the adapter has prepared the model. What no adapter changes is shared.
        """
        own = {id(layer.weight) for _, layer in adapted_layers(self)}
        shared = {id(p): p for p in self.backbone.parameters() if id(p) not in own}
        self.frozen = copy.deepcopy(self.backbone, shared)
        make_plain(self.frozen)

    @property
    def device(self) -> torch.device:
        """The backbone's device."""
        return next(self.backbone.parameters()).device

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (B x D) after the final norm: all that the classifier sees."""
        return self.encode(images).features

    def encode(self, images: Tensor, task: int | None = None) -> Encoded:
        """Features and the penalties that prompts add; ``task`` is given while it is learnt, not when it is tested."""
        with products(self.precision, self.device):
            encoded = self.prompts(self.backbone, images, task) if self.prompts else Encoded(self.backbone(images))
            features = [encoded.features]
            if self.frozen is not None:
                with torch.no_grad():
                    features.append(self.frozen(images))
        features_BD = torch.cat([part.float() for part in features], dim=1)
        return Encoded(features_BD, tuple(penalty.float() for penalty in encoded.penalties))

    def learnt_state(self) -> dict[str, Tensor]:
        """Copies of the tensors that an adapter has changed or added: merged weights, prompts."""
        merged = {f"{name}.weight" for name, _ in adapted_layers(self)}
        others = ("classifier.", "frozen.")
        state = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(others)}
        learnt = [name for name in state if name in merged or name not in self._pretrained]
        return {name: state[name].detach().cpu().clone() for name in learnt}

    def learnt_layout(self, tasks: int) -> Layout:
        """The names and shapes of ``learnt_state`` after ``tasks`` tasks, but for what adapters keep beside weights."""
        layout = {f"{name}.weight": Spec(tuple(layer.weight.shape)) for name, layer in adapted_layers(self)}
        for task in range(tasks if self.prompts is not None else 0):
            shapes = cast(Prompts, self.prompts).shapes(cast(VisionTransformer, self.backbone), task)
            layout |= {f"prompts.{name}": Spec(shape) for name, shape in shapes.items()}
        return layout

    def load_learnt_state(self, state: dict[str, Tensor]) -> None:
        """Restore ``learnt_state`` onto a freshly built and prepared model; what learning has added is made anew."""
        for name, tensor in state.items():
            self._restore(name, tensor)

    def _restore(self, name: str, tensor: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        try:
            module = self.get_submodule(path)
        except AttributeError:
            raise ValueError(f"the saved state does not fit this model: unexpected {name}") from None
        tensor = tensor.to(self.device)
        if name in self._pretrained:
            with torch.no_grad():
                module.get_parameter(leaf).copy_(tensor)
        elif leaf in module._buffers:
            module._buffers[leaf] = tensor.clone()
        elif path:
            module.register_parameter(leaf, nn.Parameter(tensor.clone(), requires_grad=False))
        else:
            raise ValueError(f"the saved state does not fit this model: unexpected {name}")
