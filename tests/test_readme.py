"""The README and the pages that go on from it, followed literally: every command, in order, in one shell, in a copy.

A command whose comment begins with "needs" cannot be followed here (a GPU, a cluster, an archive, more than minutes).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.pages import ARCHITECTURE, METRICS, STEP, TREE, defined, metric_rows, tree, with_lines

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FOLLOWED = [README, *((ROOT / "docs" / name).read_text() for name in ("data.md", "search.md", "gpu.md", "results.md"))]
NEEDS = {"a GPU", "a cluster", "an archive", "five minutes", "half an hour", "hours"}


class Command(NamedTuple):
    """A line to be typed, and what it needs that is not everywhere."""

    line: str
    needs: str | None


def commands(text: str) -> list[Command]:
    """The commands of a page's blocks: every line of ``bash``, what follows a ``$`` in ``console``."""
    found = []
    for language, block in re.findall(r"^```(bash|console)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        typed = block.splitlines() if language == "bash" else re.findall(r"^\$ (.*)$", block, re.MULTILINE)
        for text in filter(str.strip, typed):
            line, _, comment = text.partition(" #")
            needs = re.match(r"\s*needs ([^:,;]+)", comment)
            found.append(Command(line.strip(), needs and needs[1].strip()))
    return found


COMMANDS = [command for page in FOLLOWED for command in commands(page)]


def test_the_pages_commands_and_what_they_need_are_found():
    page = (
        "```bash\nls -l     # shows\nmake x  # needs a GPU: of course\n```\n"
        "```console\n$ make y  # z\noutput\n```\n```python\n1\n```\n"
    )
    assert commands(page) == [("ls -l", None), ("make x", "a GPU"), ("make y", None)]
    assert {command.needs for command in COMMANDS} <= NEEDS | {None}
    assert len([command for command in COMMANDS if command.needs is None]) > 10


def test_every_file_that_a_page_names_or_shows_is_there():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    linked = {page.parent / link for page in pages for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())}
    named = {
        ROOT / path
        for page in pages
        for path in re.findall(
            r"(?<![\w/-])(?:inflora|sweeps|cluster|tests|docs|benchmarks)/[\w/]+\.\w+", page.read_text()
        )
    }
    assert [path for path in sorted(linked | named) if not path.exists()] == []
    assert {path.name for path in (ROOT / "docs").glob("*.png")} <= {path.name for path in linked | named}


def test_every_command_is_one_of_ours_or_of_the_libraries():
    first = {shlex.split(command.line)[0] for command in COMMANDS}
    assert first <= {"make", "source", "mlflow", "sweeps", "inflora", "python", "ls", "ray"}


def test_the_readme_is_one_screen_and_a_half():
    assert len(README.splitlines()) <= 110
    assert len(README.split()) <= 900


def test_the_tree_is_that_of_the_code():
    assert TREE.search(ARCHITECTURE.read_text())[0] == tree(), "python -m tests.pages writes it anew"


def test_the_table_of_metrics_is_that_of_the_code():
    assert METRICS.search(ARCHITECTURE.read_text())[0] == metric_rows(), "python -m tests.pages writes it anew"


def test_a_reader_gets_from_a_recipe_to_the_first_loss_in_nine_files_and_1400_lines():
    walk = ARCHITECTURE.read_text().partition("**From a recipe")[2].partition("\n**")[0]
    files = {path for path, *_ in STEP.findall(walk)}
    assert {"sweeps/digits.py", "inflora/training.py"} <= files
    assert len(files) <= 9
    assert sum(len((ROOT / path).read_text().splitlines()) for path in files) <= 1400


def test_every_step_of_a_walk_is_where_its_name_is_defined():
    page = ARCHITECTURE.read_text()
    steps, now = STEP.findall(page), STEP.findall(with_lines(page))
    assert len(steps) > 20
    assert [step for step in now if step[1] == "0"] == [], "names that are gone"
    assert steps == now, "python -m tests.pages writes them anew"


def test_a_step_follows_its_name_and_one_whose_name_is_gone_stands_at_line_0(tmp_path):
    (tmp_path / "m.py").write_text("A = 1\n\n\nclass B:\n    def c(self): ...\n")
    assert defined((tmp_path / "m.py").read_text()) == {"A": 1, "B": 4, "B.c": 5}
    assert with_lines("`m.py:9 B.c` `m.py:2 d`", tmp_path) == "`m.py:5 B.c` `m.py:0 d`"


class Shell:
    """One bash in which commands are typed one after another."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.said = folder.parent / "said"
        self.bash = subprocess.Popen(
            ["bash"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=self.said.open("w"),
            stderr=subprocess.STDOUT,
            text=True,
        )

    def type(self, line: str, timeout_s: float = 600) -> tuple[int, str]:
        """Exit code and output of a line."""
        before = self.said.stat().st_size
        self.bash.stdin.write(f'{line}\necho "=== ended with $?"\n')
        self.bash.stdin.flush()
        deadline = time.monotonic() + timeout_s
        while not (ended := re.search(r"^=== ended with (\d+)\n", self.output_since(before), re.MULTILINE)):
            assert time.monotonic() < deadline, f"{line!r} has not ended: {self.output_since(before)}"
            time.sleep(0.05)
        return int(ended[1]), self.output_since(before)[: ended.start()]

    def output_since(self, size: int) -> str:
        """The text that was printed after the first ``size`` bytes."""
        return self.said.read_bytes()[size:].decode(errors="replace")  # half a letter may be there yet


@pytest.fixture
def shell(tmp_path) -> Iterator[Shell]:
    """A shell in a fresh copy of the repository, its environment ready, at home where nothing is."""
    listed = subprocess.check_output(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    for name in filter(None, listed.split("\0")):
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / "copy" / name)
    (tmp_path / "copy" / ".venv").symlink_to(sys.prefix)
    (tmp_path / "home").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("INFLORA_", "RAY_", "MLFLOW_"))}
    shell = Shell(tmp_path / "copy", {**kept, "HOME": str(tmp_path / "home"), "TERM": "dumb"})
    yield shell
    shell.bash.kill()


def serves(shell: Shell, line: str) -> None:
    """A server answers, and is stopped."""
    shell.type(f"{line} & true")
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen("http://127.0.0.1:5000/health", timeout=5) as answer:
                assert answer.status == 200
            break
        except OSError:
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.5)
    shell.type("kill %1; wait")


def follow(shell: Shell, shortened: dict[str, str]) -> None:
    """Type every command that needs nothing special; all succeed."""
    for line, needs in COMMANDS:
        if needs:
            continue
        if line.startswith("mlflow ui"):
            serves(shell, line)
            continue
        code, said = shell.type(shortened.get(line, line))
        assert code == 0, f"{line}: {said}"
        assert "Traceback" not in said, f"{line}: {said}"


PLUGIN_IN_USE = """
import sys
from pathlib import Path

import inflora
import torch
from inflora.config import parse_config
from inflora.runs import train_into

settings = {"optim": {"epochs": 1, "batch_size": 64}, "classifier": {"name": "cosine", "temperature": 0.2}}
state = train_into(Path("run"), parse_config(settings), "validation")
scores = inflora.load("run")(torch.rand(4, 1, 32, 32))
print(scores.shape[1], float(scores.abs().max()) <= 5, state.metrics(5)["acc/final"] > 0.5)
"""


@pytest.mark.e2e
def test_the_classifier_that_the_readme_adds_learns_and_is_served(tmp_path, data_root):
    """As a package of its own, which is found by its entry point."""
    (block,) = re.findall(r"^```python\n(# cosine.py.*?)^```$", README, re.MULTILINE | re.DOTALL)
    (entry,) = re.findall(r'`(cosine = "(?:.*?)")`', README)
    assert len([line for line in block.splitlines() if line]) <= 20
    (tmp_path / "cosine.py").write_text(block)
    package = tmp_path / "cosine-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Name: cosine\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[inflora.classifiers]\n" + entry.replace('"', "") + "\n")
    done = subprocess.run(
        [sys.executable, "-c", PLUGIN_IN_USE],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["10", "True", "True"]), done.stderr


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_the_pages_followed_with_a_sweep_of_two_short_trials(shell):
    sweep = ".venv/bin/python sweeps/digits.py --num-trials 2 optim.epochs=1"
    shorter = {
        "make sweep": f"{sweep} && .venv/bin/sweeps export digits -o results/digits.yaml",
        "sweeps final best.yaml --seeds 0,1,2": "sweeps final best.yaml --seeds 0",
        "python sweeps/cifar100.py --smoke": "python sweeps/cifar100.py --help",  # test_e2e.py has it
    }
    assert shorter.keys() <= {line for line, _ in COMMANDS}
    follow(shell, shorter)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_pages_followed_to_the_letter(shell):
    follow(shell, {})
