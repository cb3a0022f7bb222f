"""Weights of vision models, from local files of four kinds and from the hub; none of them may run code.

What is loaded has the names and shapes of the model, all of them and no others; only weights of positions are resized.
"""

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file
from timm.models import vision_transformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from inflora.config import ConfigError, cut
from inflora.files import require_regular

WEIGHT_SUFFIXES = (".safetensors", ".npz", ".pth", ".pt")
_HUB_FILE = "model.safetensors"
_HUB_PATIENCE_S = 5.0
"""Seconds that the hub may take to say that it has a file."""


def is_resized(name: str) -> bool:
    """True of weights that stand for positions: they are resized where the input's size differs."""
    return name.rpartition(".")[2] in ("pos_embed", "relative_position_bias_table")


def load_weights(vit: nn.Module, path: Path) -> nn.Module:
    """Load a local file; position embeddings are resized where the input's size differs, classifiers are left out.

    Raises:
        ConfigError: The file cannot be read, or is not of this model.
    """
    shown = cut(path, 200)
    if path.suffix not in WEIGHT_SUFFIXES:
        raise ConfigError(f"backbone.weights must be one of {', '.join(WEIGHT_SUFFIXES)}, got {shown}")
    try:
        require_regular(path)
    except FileNotFoundError:
        raise ConfigError(f"backbone.weights {shown} does not exist") from None
    except OSError as error:
        raise ConfigError(f"cannot load backbone.weights {shown}: {error.strerror}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice to whoever writes such files
            _load_jax(vit, path) if path.suffix == ".npz" else _load_tensors(vit, path)
        require_finite(vit)
    except Exception as error:  # damaged files of four formats raise many kinds
        raise ConfigError(f"cannot load backbone.weights {shown}: {reason_of(error)}") from None
    return vit


def require_finite(vit: nn.Module) -> None:
    """Raise ValueError where a weight is not a finite number."""
    for name, tensor in vit.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not given, or holds numbers that are not finite")


def reason_of(error: Exception) -> str:
    """Tell an error in one line, without a library's advice to its programmers."""
    if "weights_only" in str(error):  # PyTorch's advice is to let the file run its code
        return "it holds other things than tensors and plain values, which are not read"
    return cut(f"{type(error).__name__}: {error}", 250)


def _load_tensors(vit: nn.Module, path: Path) -> None:
    """From safetensors, or a PyTorch checkpoint."""
    tensors = _backbone_tensors(load_file(path) if path.suffix == ".safetensors" else _load_pickled(path))
    own = {name: tensor.dtype for name, tensor in vit.state_dict().items()}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and tensor.dtype != own.get(name):
            raise TypeError(f"{name} is of type {tensor.dtype}")
    numbers = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    fitted = _filter_of(vit)(numbers, vit)
    for name, tensor in fitted.items():
        if not is_resized(name) and name in tensors and tensors[name].numel() != tensor.numel():
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, the model's has {tuple(tensor.shape)}")
    foreign = {name for name in fitted if name.split(".")[0] in ("head", "head_dist") and name not in own}
    vit.load_state_dict({name: tensor for name, tensor in fitted.items() if name not in foreign})


def _filter_of(vit: nn.Module) -> Callable[[dict[str, Tensor], Any], dict[str, Tensor]]:
    """timm's function for a model's files, which knows older names and resizes; as they are where it has none."""
    if isinstance(vit, VisionTransformer):  # of whatever module
        return vision_transformer.checkpoint_filter_fn
    return getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", lambda tensors, _: tensors)


def _load_pickled(path: Path) -> dict[str, Any]:
    """A PyTorch checkpoint; tensors and plain values only, nothing that could run code."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict):
        raise TypeError(f"it holds a {type(checkpoint).__name__}, expected a dictionary of tensors")
    return checkpoint


@torch.no_grad()
def _load_jax(vit: nn.Module, path: Path) -> None:
    """From the original JAX release."""
    if not isinstance(vit, VisionTransformer):
        raise TypeError(f".npz is the JAX release's form of a VisionTransformer, this is a {type(vit).__name__}")
    kept = _numbers({name: tensor for name, tensor in vit.state_dict().items() if "pos_embed" not in name})
    with np.load(path, allow_pickle=False) as arrays:
        there = {name: arrays[name] for name in arrays.files}
    prefix = next((name.removesuffix("embedding/kernel") for name in there if name.endswith("embedding/kernel")), "")
    left_out = re.compile(rf"{prefix}(head/|pre_logits/|.*pos_?embedding)")
    given = _numbers({n: a for n, a in there.items() if n.startswith(prefix) and not left_out.match(n)})
    if given != kept:
        raise ValueError(f"it has {given} numbers, the model {kept} (position embeddings and classifiers not counted)")
    for parameter in vit.parameters():
        parameter.fill_(torch.nan)  # so that one that is not given is found
    vit.load_pretrained(str(path))


def _numbers(tensors: dict[str, Any]) -> int:
    return sum(int(np.prod(tensor.shape)) for tensor in tensors.values())


def _backbone_tensors(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The backbone's tensors in a checkpoint of a training run: the (teacher's) model, without what wraps it.

    Self-supervised releases (DINO, iBOT) keep the weights under "teacher" or "state_dict", with "module.backbone."
    before every name and a projection head beside them.
    """
    for key in ("teacher", "state_dict", "model"):
        if isinstance(checkpoint.get(key), dict):
            return _backbone_tensors(checkpoint[key])
    tensors = {name.removeprefix("module."): value for name, value in checkpoint.items() if torch.is_tensor(value)}
    if any(name.startswith("backbone.") for name in tensors):
        tensors = {name[9:]: value for name, value in tensors.items() if name.startswith("backbone.")}
    if "masked_embed" in tensors:  # iBOT's mask token, used in its pre-training only
        del tensors["masked_embed"]
    return tensors


def from_cache(name: str) -> dict[str, str] | None:
    """The option that makes timm read the hub's cached file without asking the hub for a newer one."""
    source = timm.get_pretrained_cfg(name)
    path = source and source.hf_hub_id and try_to_load_from_cache(source.hf_hub_id, _HUB_FILE)
    return {"file": path} if isinstance(path, str) else None


def require_hub(name: str) -> None:
    """Raise ConfigError unless the hub answers; the download itself would try again and again for a minute."""
    source = timm.get_pretrained_cfg(name)
    if source is None or not source.hf_hub_id:
        return
    try:
        get_hf_file_metadata(hf_hub_url(source.hf_hub_id, _HUB_FILE), timeout=_HUB_PATIENCE_S)
    except EntryNotFoundError:  # the hub is there, and has the weights under another name
        return
    except Exception as error:  # of the network, the proxy, the hub, the cache's settings
        raise unavailable(name, error) from None


def unavailable(name: str, error: Exception) -> ConfigError:
    """The named weights cannot be had: why, and what to do."""
    return ConfigError(
        f"cannot load the weights of backbone.name {cut(repr(name))}: they are not in the hub's cache and cannot be "
        f"had from here ({reason_of(error)}); {_where_to_get(name)}"
    )


def _where_to_get(name: str) -> str:
    """Say which file to download and where to put it."""
    source = timm.get_pretrained_cfg(name)
    hub_id = source.hf_hub_id if source else None
    ways = "load the model once where there is a network and take its cache along ($HF_HOME)"
    if hub_id:
        ways = f"download {_HUB_FILE} of {hub_id} where there is a network"
    return f"{ways} and set backbone.weights=PATH ({', '.join(WEIGHT_SUFFIXES)})"
