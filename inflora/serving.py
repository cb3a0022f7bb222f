"""A run's folder as a model to be used: plain timm, merged, with the names of its classes and its view of an image."""

from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageOps, ImageStat
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from inflora.attention import input_shape
from inflora.backbone import backbone_hash, build_backbone, shape_of
from inflora.config import RunConfig, load_config
from inflora.cuda import pick_device
from inflora.data.errors import DataError
from inflora.data.images import as_rgb, read_image
from inflora.data.loader import InputFormat, evaluation_batches
from inflora.data.pixels import FilePixels, Pixels, RawPixels
from inflora.data.store import Images
from inflora.integrity import check_state
from inflora.learner import make_learner
from inflora.lora import make_plain
from inflora.model import ContinualModel
from inflora.predictions import Prediction
from inflora.setup import restore
from inflora.state import DataFacts, RunState, StateError, load_state, of_folder

_BATCH = 64


class EvaluationView:
    """An image, or the path of one, as the model's input (C, S, S): the pixels that the run was evaluated on."""

    def __init__(self, input_format: InputFormat, facts: DataFacts) -> None:
        self._input_format, self._facts = input_format, facts

    def __call__(self, image: Image.Image | Path | str) -> Tensor:
        """Raises DataError where a file cannot be read as an image."""
        opened = as_rgb(image) if isinstance(image, Image.Image) else read_image(Path(image))
        row = torch.zeros(1, dtype=torch.int64)
        (batch,) = evaluation_batches(Images(self._stored(opened), row, row), row, self._input_format, 1)
        return batch.images[0]

    def _stored(self, image: Image.Image) -> Pixels:
        """The image as a store with nothing else in it would hold it."""
        if self._facts.raw:
            array = np.array(image.convert("L" if self._facts.channels == 1 else "RGB"))
            return RawPixels(torch.from_numpy(array).view(1, *array.shape[:2], self._facts.channels))
        content = pa.array([image.tobytes()], pa.large_binary())
        return FilePixels([content], torch.tensor([[image.height, image.width]]), encoded=False, store="")

    def doubt(self, image: Image.Image) -> str:
        """Warn of an image that is as bright as a training image's negative; empty of all others."""
        if self._facts.brightness is None:
            return ""
        (low, high), mean = self._facts.brightness, ImageStat.Stat(image.convert("L")).mean[0] / 255
        away, negatives = (max(low - pixel, pixel - high) for pixel in (mean, 1 - mean))
        if away <= 0 or negatives > away / 2:
            return ""
        return f"mean pixel {mean:.2f} of 1, the training images' {low:.2f} to {high:.2f}"


class Served(Protocol):
    """A model with the attributes that ``load`` adds."""

    class_names: tuple[str, ...]
    class_of: tuple[int, ...]
    transform: EvaluationView

    def __call__(self, images: Tensor) -> Tensor: ...


def load(path: str | PathLike[str]) -> nn.Module:
    """The model that a run's folder (``config.yaml`` and ``state/``) holds: on the CPU, in float32, in eval mode.

    A plain timm model: adapters merged, the classifier as its head. Where prompts are learnt, features are both
    models', or the classifier is not linear in what timm's reads, it is a ``ContinualModel``. Either gives logits (B x
    outputs) and has

    - ``class_names``: the class that each output means. In domain-incremental runs every domain has outputs of its
      own, so that names come again: the class of the largest logit is the answer, as in the run's evaluation;
    - ``class_of``: each output's class as a number;
    - ``transform``: from a PIL image or a file to the model's input (C, S, S).

    Raises:
        ConfigError, StateError: No run is there, it is damaged, or its backbone's weights are not at hand.
    """
    folder = Path(path)
    config, state = _load_run(folder)
    assert state.data is not None  # or it would have been refused
    backbone = build_backbone(config.backbone)
    if backbone_hash(backbone) != state.backbone_hash:
        raise StateError(
            f"{folder} was trained from other weights ({state.backbone_hash}) than backbone.name "
            f"{config.backbone.name!r} and backbone.weights give here ({backbone_hash(backbone)})"
        )
    shape = shape_of(backbone)
    learnt, adapter = make_learner(config, backbone)
    restore(learnt, adapter, state)
    make_plain(learnt)
    outputs = learnt.classifier.classes
    model = _as_timm(learnt) or learnt
    input_format = InputFormat(config.data, shape.image_size, shape.channels, torch.device("cpu"))
    about = {
        "class_of": state.data.class_of[:outputs],
        "class_names": tuple(state.data.classes[label] for label in state.data.class_of[:outputs]),
        "transform": EvaluationView(input_format, state.data),
    }
    for name, value in about.items():
        setattr(model, name, value)
    return model.requires_grad_(False).eval()


def _load_run(folder: Path) -> tuple[RunConfig, RunState]:
    """A run's config and state, which hold what each says of the other."""
    state, file = load_state(folder / "state"), folder / "config.yaml"
    if not file.is_file():
        raise StateError(f"{file} is missing, or not a file")
    config = load_config(file)
    with of_folder(folder):
        if not state.tasks_done:
            raise StateError("the run has learnt no task")
        check_state(config, state)
    return config, state


def _as_timm(learnt: ContinualModel) -> nn.Module | None:
    """The backbone alone, with everything learnt in it; None where timm's model could not compute the same."""
    head = learnt.classifier.as_linear()
    if head is None or learnt.prompts is not None or learnt.frozen is not None:
        return None
    model, image = cast(Any, learnt.backbone), torch.rand(1, *(input_shape(learnt.backbone) or ()))
    with torch.no_grad():
        expected = learnt(image)
        try:
            model.reset_classifier(head.out_features)
            model.get_classifier().load_state_dict(head.state_dict())
            if type(model) is VisionTransformer or torch.allclose(model(image), expected, rtol=1e-4, atol=1e-5):
                return cast(nn.Module, model)
        except (AttributeError, RuntimeError):  # some have two classifiers, or one that is no linear layer
            pass
        model.reset_classifier(0)
    return None


@torch.no_grad()
def predict(
    model: nn.Module, files: Iterable[Path], top: int = 1, *, device: str = "auto", invert: bool = False
) -> Iterator[Prediction]:
    """Answer for some images, in their order, with a model that ``load`` gave, on the ``device`` of that setting.

    With ``invert`` of their negatives: dark ink on white paper is light on dark then, as in most sets of digits.

    Of several outputs that mean the same class the largest counts, so that the best class is that of the run's own
    evaluation; probabilities are the softmax over classes.

    Raises:
        ConfigError: CUDA is asked for and there is none.
    """
    there = pick_device(device)
    served = cast(Served, model.to(there))
    class_of = torch.tensor(served.class_of, device=there)
    names = dict(zip(served.class_of, served.class_names, strict=True))
    waiting = list(files)
    for start in range(0, len(waiting), _BATCH):
        seen = [_seen(served.transform, file, invert) for file in waiting[start : start + _BATCH]]
        views = [view for view, _ in seen if view is not None]
        answers: Iterator[tuple[list[float], list[int]]] = iter(())
        if views:
            logits = served(torch.stack(views).to(there))
            classes = logits.new_full((len(views), len(names)), -torch.inf)
            classes.scatter_reduce_(1, class_of.expand(len(views), -1), logits, "amax")
            chances, labels = classes.softmax(1).topk(min(top, len(names)))
            answers = zip(chances.tolist(), labels.tolist(), strict=True)
        for view, said in seen:
            if view is not None:
                pairs = zip(*next(answers), strict=True)
                said = said._replace(classes=tuple((names[label], chance) for chance, label in pairs))
            yield said


def _seen(transform: EvaluationView, file: Path, invert: bool) -> tuple[Tensor | None, Prediction]:
    """A file as the model sees it, and what can be said of it without the model; None where it is no image."""
    try:
        image = read_image(file)
        if invert:
            image = ImageOps.invert(image)
        return transform(image), Prediction(file, doubt=transform.doubt(image))
    except DataError as error:
        return None, Prediction(file, error=str(error))
