"""The wheel's one addition to pyproject.toml: what stands beside the packages, for ``sweeps cluster-files``."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

BESIDE = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "cluster")


class BuildWithProject(build_py):
    """The packages, and in ``sweeps/project`` the files with which they are a project again."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the files are where they are
            return
        for file in (file for name in BESIDE for file in (Path(name), *Path(name).rglob("*")) if file.is_file()):
            kept = Path(self.build_lib, "sweeps", "project", file)
            self.mkpath(str(kept.parent))
            self.copy_file(str(file), str(kept))


setup(cmdclass={"build_py": BuildWithProject})
