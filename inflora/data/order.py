"""Given beginnings: passes in a given order, classifiers that start from given values.

For comparing a run number by number with another implementation's (docs/fidelity.md). Both are safetensors files:
``data.order`` holds ``<task>/<pass>`` -> numbers of images in the stored training split, one tensor for each pass
("covariance-before", "train-0", "train-1"..., "covariance-after"); ``optim.head_init`` holds ``<task>.weight`` and
``<task>.bias``.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from inflora.config import ConfigError


def read_given(path: Path, setting: str) -> dict[str, Tensor]:
    """The tensors in the file that ``setting`` names.

    Raises:
        ConfigError: It is missing or no safetensors file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read {setting} {path}: {' '.join(str(error).split())[:200]}") from None


def ordered_rows(orders: dict[str, Tensor], task: int, purpose: str, rows: Tensor) -> Tensor:
    """The rows of one pass as ``data.order`` gives them: all of the task's ``rows``, each once.

    Raises:
        ConfigError: The pass is not given, or is not over these rows.
    """
    name = f"{task}/{purpose}"
    if name not in orders:
        raise ConfigError(f"data.order does not give the pass {name}; it gives {', '.join(sorted(orders)[:8])}...")
    given = orders[name].to(torch.int64)
    if not torch.equal(given.sort().values, rows.sort().values):
        raise ConfigError(f"data.order must name each of the {len(rows)} images of task {task} once in {name}")
    return given
