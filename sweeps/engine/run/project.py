"""The project as a folder, made of what is installed: the cluster files, and all that they put on machines."""

import shutil
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from inflora.config import ConfigError
from inflora.errors import one_line
from inflora.files import why_unwritable

_BESIDE = "project"
"""The folder in ``sweeps/`` in which a wheel has what stands beside the packages in the repository; see setup.py."""


def lay_out(folder: Path) -> None:
    """Write a new folder from which ``ray up cluster/gpu.yaml`` works: the installed code, recipes and cluster files.

    Raises:
        ConfigError: The project is installed from a folder of its own, or this one is not new or cannot be written.
    """
    code = {name: Path(str(files(name))) for name in ("inflora", "sweeps")}
    beside = code["sweeps"] / _BESIDE
    if not beside.is_dir():
        raise ConfigError(f"the project is not installed from a wheel: its cluster files are in {beside.parents[1]}")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(f"{one_line(str(folder), 200)} is there already: give a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if problem := why_unwritable(folder.parent):
        raise ConfigError(problem)
    with TemporaryDirectory(dir=folder.parent) as draft:
        whole = shutil.copytree(beside, Path(draft) / "project")
        for name, package in code.items():
            shutil.copytree(package, whole / name, ignore=shutil.ignore_patterns("__pycache__", _BESIDE))
        whole.rename(folder)
