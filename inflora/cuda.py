"""The CUDA that is there: driver, PyTorch's build, devices; ``python -m inflora.cuda`` fails where there is none."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from inflora.config import ConfigError

_LOADED = Path("/proc/driver/nvidia/version")


def driver_version(loaded: Path = _LOADED) -> str | None:
    """The NVIDIA driver's version as the kernel, or else ``nvidia-smi``, tells it; None where neither does."""
    said = loaded.read_text() if loaded.exists() else ""
    tool = shutil.which("nvidia-smi")
    if not said and tool:
        query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout
        except (OSError, subprocess.TimeoutExpired):
            return None
    found = re.search(r"\d{3,}\.\d+(\.\d+)?", said)
    return found[0] if found else None


def versions() -> str:
    """The versions of the driver, of the CUDA that PyTorch was built for, and of PyTorch."""
    driver = driver_version()
    return ", ".join(
        (
            f"driver {driver}" if driver else "no NVIDIA driver",
            f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA",
            f"PyTorch {torch.__version__}",
        )
    )


def missing_cuda() -> str:
    """Say why PyTorch finds no CUDA device here, and which versions there are; empty where it finds one."""
    if torch.cuda.is_available():
        return ""
    try:
        torch.cuda.init()
        why = "it counts 0"
    except (RuntimeError, AssertionError) as error:
        why = str(error).split(". ")[0].strip()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f", CUDA_VISIBLE_DEVICES={visible!r}"
    return f"PyTorch finds no CUDA device here ({why}): {versions()}{hidden}"


def require_cuda() -> None:
    """Raise ConfigError unless there is a CUDA device."""
    if missing := missing_cuda():
        raise ConfigError(missing)


def require_device(name: str) -> None:
    """Raise ConfigError where ``config.device`` asks for CUDA and there is none; takes hold of no GPU."""
    if name == "cuda" and (missing := missing_cuda()):
        raise ConfigError(f"device must be auto or cpu, got cuda: {missing}")


def pick_device(name: str) -> torch.device:
    """The device that ``config.device`` names, with its index; "auto" is CUDA where there is one.

    Raises:
        ConfigError: CUDA is asked for and there is none.
    """
    require_device(name)
    if name != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


if __name__ == "__main__":
    sys.exit(missing_cuda() or 0)
