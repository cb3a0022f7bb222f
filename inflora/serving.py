"""A run's folder as a model to be used: plain timm, merged, with the names of its classes and its view of an image."""

from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from inflora.backbone import backbone_hash, build_backbone, shape_of
from inflora.config import load_config
from inflora.continual import pick_device
from inflora.data.images import as_rgb, read_image
from inflora.data.loader import Input, evaluation_batches
from inflora.data.pixels import FilePixels, Pixels, RawPixels
from inflora.data.store import Images
from inflora.lora import make_plain
from inflora.methods import make_method
from inflora.model import ContinualModel, joined
from inflora.state import DataFacts, StateError, load_state

_BATCH = 64


class EvaluationView:
    """An image, or the path of one, as the model's input (C, S, S): the pixels that the run was evaluated on."""

    def __init__(self, input: Input, facts: DataFacts) -> None:
        self._input, self._facts = input, facts

    def __call__(self, image: Image.Image | Path | str) -> Tensor:
        """Raises DataError where a file cannot be read as an image."""
        opened = as_rgb(image) if isinstance(image, Image.Image) else read_image(Path(image))
        row = torch.zeros(1, dtype=torch.int64)
        (batch,) = evaluation_batches(Images(self._stored(opened), row, row), row, self._input, 1)
        return batch.images[0]

    def _stored(self, image: Image.Image) -> Pixels:
        """The image as a store with nothing else in it would hold it."""
        if self._facts.raw:
            array = np.array(image.convert("L" if self._facts.channels == 1 else "RGB"))
            return RawPixels(torch.from_numpy(array).view(1, *array.shape[:2], self._facts.channels))
        content = pa.array([image.tobytes()], pa.large_binary())
        return FilePixels([content], torch.tensor([[image.height, image.width]]), encoded=False, store="")


class Served(Protocol):
    """What ``load`` adds to a model."""

    class_names: tuple[str, ...]
    class_of: tuple[int, ...]
    transform: EvaluationView

    def __call__(self, images: Tensor) -> Tensor: ...


class Prompted(nn.Module):
    """What a prompt method has learnt: asks the backbone with prompts, which no plain timm model can."""

    def __init__(self, learnt: ContinualModel) -> None:
        super().__init__()
        self.learnt = learnt

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B x outputs)."""
        return self.learnt.logits(self.learnt.features(images))


def load(path: str | PathLike[str]) -> nn.Module:
    """The model that a run's folder (``config.yaml`` and ``state/``) holds: on the CPU, in float32, in eval mode.

    A plain timm ``VisionTransformer``: adapters merged, the tasks' classifiers concatenated into its head. Only a
    prompt method's model is a module of our own around one. Either gives logits (B x outputs) and has

    - ``class_names``: the class that each output means. In domain-incremental runs every domain has outputs of its
      own, so that names come again: the class of the largest logit is the answer, as in the run's evaluation;
    - ``class_of``: each output's class as a number;
    - ``transform``: from a PIL image or a file to the model's input (C, S, S).

    Raises:
        ConfigError, StateError: No run is there, it has learnt no task, or its backbone's weights are not at hand.
    """
    folder = Path(path)
    state, config = load_state(folder / "state"), load_config(folder / "config.yaml")
    if state.data is None:
        raise StateError(f"{folder / 'state'} is of an older version, without the names of its classes; train it again")
    backbone = build_backbone(config.backbone)
    if backbone_hash(backbone) != state.backbone_hash:
        raise StateError(
            f"{folder} was trained from other weights ({state.backbone_hash}) than backbone.name "
            f"{config.backbone.name!r} and backbone.weights give here ({backbone_hash(backbone)})"
        )
    shape = shape_of(backbone)
    learnt = ContinualModel(backbone, shape.width)
    make_method(config.method).prepare(learnt)
    learnt.load_learnt_state(state.model)
    model = Prompted(learnt) if learnt.prompts is not None else _plain(learnt)
    outputs = learnt.logits(torch.zeros(1, shape.width)).shape[1]
    input = Input(config.data, shape.image_size, shape.channels, torch.device("cpu"))
    about = {
        "class_of": state.data.class_of[:outputs],
        "class_names": tuple(state.data.classes[label] for label in state.data.class_of[:outputs]),
        "transform": EvaluationView(input, state.data),
    }
    for name, value in about.items():
        setattr(model, name, value)
    return model.requires_grad_(False).eval()


def _plain(learnt: ContinualModel) -> VisionTransformer:
    """The backbone alone, with everything learnt in it."""
    vit = cast(VisionTransformer, learnt.backbone)
    make_plain(vit)
    weight, bias = joined(learnt.heads)
    vit.reset_classifier(len(bias))
    cast(nn.Linear, vit.head).load_state_dict({"weight": weight, "bias": bias})
    return vit


class Prediction(NamedTuple):
    """One image's most probable classes, the best first."""

    file: Path
    classes: tuple[tuple[str, float], ...]


@torch.no_grad()
def predict(model: nn.Module, files: Iterable[Path], top: int = 1, *, device: str = "auto") -> Iterator[Prediction]:
    """What a model that ``load`` gave says of some images, on the ``device`` of that setting.

    Of several outputs that mean the same class the largest counts, so that the best class is that of the run's own
    evaluation; probabilities are the softmax over classes.

    Raises:
        ConfigError: CUDA is asked for and there is none.
        DataError: A file cannot be read as an image; those before its batch have been answered.
    """
    there = pick_device(device)
    served = cast(Served, model.to(there))
    class_of = torch.tensor(served.class_of, device=there)
    names = dict(zip(served.class_of, served.class_names, strict=True))
    waiting = list(files)
    for start in range(0, len(waiting), _BATCH):
        batch = waiting[start : start + _BATCH]
        logits = served(torch.stack([served.transform(file) for file in batch]).to(there))
        classes = logits.new_full((len(batch), len(names)), -torch.inf)
        classes.scatter_reduce_(1, class_of.expand(len(batch), -1), logits, "amax")
        chances, labels = classes.softmax(1).topk(min(top, len(names)))
        for file, chance, label in zip(batch, chances.tolist(), labels.tolist(), strict=True):
            yield Prediction(file, tuple((names[i], p) for i, p in zip(label, chance, strict=True)))
