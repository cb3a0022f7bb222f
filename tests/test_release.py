"""A release: what wheel and sdist hold, that an installed wheel is enough, and that all files tell one version."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]


class Built(NamedTuple):
    """The files of a release, and the source that they were built of."""

    source: Path
    wheel: Path
    sdist: Path


def tracked(*paths: str) -> set[str]:
    listed = subprocess.check_output(
        ["git", "ls-files", "-z", "-co", "--exclude-standard", *paths], cwd=ROOT, text=True
    )
    return set(filter(None, listed.split("\0")))


def build(source: Path, out: Path, *options: str) -> None:
    """Build as ``make release`` does, with this environment's setuptools, so that nothing is fetched."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    """Of a copy of the repository: a build leaves its traces where it is."""
    folder = tmp_path_factory.mktemp("release")
    for name in tracked():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    build(folder / "source", folder / "dist")
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return Built(folder / "source", wheel, sdist)


@pytest.fixture(scope="module")
def unpacked(built, tmp_path_factory) -> Path:
    """The wheel as it lies in an environment, without the programs that an installer writes."""
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(built.wheel).extractall(folder)
    return folder


def in_wheel(wheel: Path) -> set[str]:
    """All files but those that tell of the wheel itself."""
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_the_wheel_has_every_module_the_weights_the_types_and_the_project_s_files(built):
    beside = {"pyproject.toml", "setup.py", "README.md", "LICENSE", *tracked("cluster")}
    assert in_wheel(built.wheel) == tracked("inflora", "sweeps") | {f"sweeps/project/{name}" for name in beside}
    assert {"inflora/py.typed", "sweeps/py.typed", "inflora/weights/glyph_vit.safetensors"} <= in_wheel(built.wheel)
    assert {"sweeps/digits.py", "sweeps/project/cluster/gpu.yaml"} <= in_wheel(built.wheel)


def test_the_sdist_has_all_that_the_repository_has(built):
    with tarfile.open(built.sdist) as sdist:
        files = {name.partition("/")[2] for name in sdist.getnames()}
    ours = {name for name in tracked() if not name.startswith(".git")}
    assert ours - files == set()


def run_from(unpacked: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def files_of(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_a_wheel_lays_the_project_out_again_as_the_cluster_files_want_it(built, unpacked, tmp_path):
    done = run_from(unpacked, "sweeps.cli", "cluster-files", "laid/out", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "laid/out: go there, and on with cluster/README.md\n"), done.stderr
    files = ("cluster", "inflora", "sweeps", "pyproject.toml", "setup.py", "README.md", "LICENSE")
    assert files_of(tmp_path / "laid/out") == tracked(*files)
    for launcher in ("gpu.yaml", "local.yaml"):
        mounted = yaml.safe_load((tmp_path / "laid/out/cluster" / launcher).read_text())["file_mounts"].values()
        assert [name for name in mounted if not (name[0] == "~" or (tmp_path / "laid/out" / name).exists())] == []
    build(tmp_path / "laid/out", tmp_path / "again", "--wheel")
    (again,) = (tmp_path / "again").iterdir()
    assert in_wheel(again) == in_wheel(built.wheel)


@pytest.mark.parametrize("kept", ["taken", "taken/mine"], ids=["a file", "a folder"])
def test_what_is_there_is_not_written_over(unpacked, tmp_path, kept):
    (tmp_path / kept).parent.mkdir(exist_ok=True)
    (tmp_path / kept).write_text("kept")
    done = run_from(unpacked, "sweeps.cli", "cluster-files", "taken", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: taken is there already: give a new folder\n")
    assert (files_of(tmp_path), (tmp_path / kept).read_text()) == ({kept}, "kept")


def test_in_the_repository_the_command_says_where_the_files_are(tmp_path):
    done = run_from(ROOT, "sweeps.cli", "cluster-files", "new", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: the project is not installed from a wheel: its cluster files are in {ROOT}\n"
    assert list(tmp_path.iterdir()) == []


def test_the_program_tells_the_version_of_what_is_installed(unpacked, tmp_path):
    done = run_from(unpacked, "sweeps.cli", "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"inflora-sweeps {VERSION}\n"), done.stderr


def test_wherever_else_a_version_is_told_it_is_the_project_s():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == VERSION
    released = re.findall(r"^## \[(\d.*?)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == VERSION
    images = re.findall(r"inflora-sweeps:([\w.]+)", "".join((ROOT / name).read_text() for name in tracked("cluster")))
    assert len(images) > 5 and set(images) == {VERSION}


def test_the_changelog_keeps_its_form():
    """https://keepachangelog.com: the newest first, changes under their kinds."""
    text = (ROOT / "CHANGELOG.md").read_text()
    released = [Version(number) for number in re.findall(r"^## \[(\d.*?)\]", text, re.MULTILINE)]
    assert released == sorted(released, reverse=True)
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= {
        *("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
    }


# Of the Citation File Format 1.2.0: what must be there, and what a file like ours may have.
CFF = {"cff-version", "message", "title", "authors"}
CFF_MAY = CFF | {
    *("type", "abstract", "version", "license", "keywords", "references", "date-released", "doi", "identifiers"),
    *("repository-code", "url", "contact", "commit", "license-url", "preferred-citation", "repository"),
}
ENTITY, PERSON = {"name"}, {"given-names", "family-names"}


def test_the_citation_is_one_that_its_readers_can_read():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert CFF <= cited.keys() <= CFF_MAY
    assert (cited["cff-version"], cited["type"], cited["license"]) == ("1.2.0", "software", PROJECT["license"])
    (paper,) = cited["references"]
    assert {"type", "title", "authors", "year"} <= paper.keys() and type(paper["year"]) is int
    assert paper["title"].startswith("InfLoRA:")
    for author in [*cited["authors"], *paper["authors"]]:
        assert author.keys() in (ENTITY, PERSON)
    assert {each["type"] for each in paper["identifiers"]} <= {"doi", "url", "swh", "other"}


def pinned_lowest() -> dict[str, str]:
    text = (ROOT / ".ci" / "lowest.txt").read_text()
    return dict(re.findall(r"^([\w.-]+)(?:\[.*?\])?==(\S+)", text, re.MULTILINE))


def test_the_lowest_versions_are_the_bounds_themselves():
    """Else ``make lowest`` shows nothing of them; CONTRIBUTING.md has the command that writes the file anew."""
    pinned = pinned_lowest()
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *extras["postgresql"], *extras["cluster"]]:
        wanted = Requirement(text)
        if wanted.name == PROJECT["name"]:
            continue
        (lower,) = [each.version for each in wanted.specifier if each.operator == ">="]
        chosen, bound = Version(pinned[wanted.name]), Version(lower).release
        assert chosen.release[: len(bound)] == bound, f"{text}: the lowest is {chosen}"


def workflow(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())


def test_workflows_run_what_ci_runs_the_lower_end_and_the_build_and_may_only_read():
    jobs = {**workflow("ci.yml")["jobs"], **workflow("release.yml")["jobs"]}
    commands = {name: [step.get("run") for step in job.get("steps", [])] for name, job in jobs.items()}
    assert "bash .ci/run" in commands["highest"] and "make lowest" in commands["lowest"]
    assert "make release" in commands["build"] and jobs["release"]["uses"] == "./.github/workflows/release.yml"
    for name in ("ci.yml", "release.yml"):
        assert workflow(name)["permissions"] == {"contents": "read"}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    typed = [line for lines in commands.values() for line in lines if line]
    assert {target for line in typed for target in re.findall(r"^make ([\w-]+)", line)} <= targets


@pytest.fixture(scope="module")
def user(built, tmp_path_factory):
    """A way to type commands in an empty folder, with the wheel in an environment of its own.

    What it depends on is lent by this environment: a path in a .pth file is searched last, and the file that makes the
    project itself importable there is not read.
    """
    folder = tmp_path_factory.mktemp("user")
    programs, work = folder / "env" / "bin", folder / "work"
    work.mkdir()
    ours = ("INFLORA_", "RAY_", "MLFLOW_", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    told = {**kept, "PATH": f"{programs}:{kept['PATH']}", "INFLORA_DATA": str(folder / "data"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], env=told, check=True)
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", built.wheel]
    subprocess.run([programs / "python", *install], env=told, check=True)
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    (packages / "lent.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))

    def command(line: str) -> str:
        done = subprocess.run(line.split(), cwd=work, env=told, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        return done.stdout

    command.folder, command.packages, command.python = work, packages, programs / "python"
    return command


@pytest.mark.e2e
def test_a_type_checker_sees_the_installed_packages_types(user):
    (user.folder / "use.py").write_text(
        "from inflora.errors import one_line\nfrom sweeps.engine.ledger.bill import share\n"
        "reveal_type(one_line('a'))\nreveal_type(share(1, 2))\n"
    )
    said = user(f"{sys.executable} -m mypy --config-file= --python-executable {user.python} use.py")
    assert re.findall(r'Revealed type is "(?:builtins\.)?(\w+)"', said) == ["str", "float"], said


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_a_sweep_and_its_model_need_nothing_but_the_wheel(user):
    """From the recipe to a prediction, far from the repository; the code is the wheel's, also in Ray's workers."""
    assert "best: trial" in user("python -m sweeps.digits --num-trials 2 optim.epochs=1")
    user("sweeps export digits -o best.yaml")
    user("inflora train best.yaml --out trained")
    (user.folder / "scan.png").write_bytes((ROOT / "docs" / "scan.png").read_bytes())
    assert re.match(r"scan\.png\s+\d\s", user("inflora predict trained scan.png --invert"))
    user("sweeps cluster-files project")
    assert (user.folder / "project" / "cluster" / "gpu.yaml").is_file()
    where = user("python -c print(__import__('sweeps').__file__,__import__('inflora').__file__)").split()
    assert [Path(file).parents[1] for file in where] == [user.packages] * 2
