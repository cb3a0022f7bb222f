"""The documentation's site: all pages are on it, links lead somewhere, the reference says all that the code has."""

import importlib
import json
import os
import re
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import typer
from typer.main import get_command

from docs.site import build, reference
from inflora import cli as inflora_cli
from inflora import load
from inflora.backbone import build_backbone
from inflora.config import ADAPTERS, CLASSIFIERS, Alternative, RunConfig, override
from inflora.config.listing import all_settings, lines_of_settings, settings_of
from inflora.data import prepare_store, samples
from inflora.data.source import Dataset, Options
from inflora.data.store import read_manifest
from inflora.runs import train_into
from sweeps import cli as sweeps_cli
from sweeps.engine.space.spec import Sweep
from tests.pages import defined
from tests.test_readme import COMMANDS, commands

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "digits.ipynb"


@pytest.fixture(scope="module")
def site() -> dict[str, str | bytes]:
    return build.gather()


@pytest.fixture(scope="module")
def pages(site) -> dict[str, str]:
    return {name: content for name, content in site.items() if isinstance(content, str)}


# Pages and links.


def test_every_page_of_the_docs_is_on_the_site_and_once_in_its_navigation(site):
    files = [path for path in (ROOT / "docs").rglob("*.*") if path.suffix in (".md", ".ipynb")]
    written = {path.relative_to(ROOT).as_posix() for path in files}
    sections = tomllib.loads(build.configuration(site))["project"]["nav"]
    named = [item for section in sections for items in section.values() for item in items]
    linked = [item if isinstance(item, str) else next(iter(item.values())) for item in named]
    assert {build.place(path) for path in written} | set(reference.PAGES) <= set(linked)
    assert sorted(linked) == sorted({name for name in site if name.endswith(".md") and not name.startswith("source/")})


def test_a_page_that_nobody_has_heard_of_has_a_place_in_the_navigation():
    sections = build.navigation(["index.md", "results.md", "results/cifar100-10.md", "backbones.md"])
    assert sections == {
        "Start": ["index.md"],
        "Results": ["results.md", "results/cifar100-10.md"],
        "More": ["backbones.md"],
    }


def written(root: Path, **pages: str) -> Path:
    for name, text in pages.items():
        (root / "docs").mkdir(exist_ok=True)
        (root / "docs" / f"{name}.md").write_text(text)
    return root


def test_links_lead_to_where_things_are_on_the_site(tmp_path):
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "README.md").write_text("[search](../docs/search.md#what)")
    (tmp_path / "run.py").write_text("print()\n")
    text = "[c](../cluster/README.md#slurm) [code](../run.py) [`x`](#here) [web](https://a.example/b) `[no](link)`"
    found = build.gather(written(tmp_path, search=text))
    assert found["search.md"] == (
        "[c](cluster.md#slurm) [code](source/run.py.md) [`x`](#here) [web](https://a.example/b) `[no](link)`"
    )
    assert found["cluster.md"] == "[search](search.md#what)"
    assert found["source/run.py.md"] == '# run.py\n\n````python title="run.py"\nprint()\n````\n'


def test_a_link_to_nothing_names_the_page_and_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"^docs/faults.md: there is no docs/nothing.md$"):
        build.gather(written(tmp_path, faults="[x](nothing.md#y)"))


def test_a_linked_folder_is_a_page_of_its_files(site):
    assert "OptimSettings" not in site["source/docs/flowers.md"]
    assert site["source/docs/flowers.md"].count("\n````") == 2 * len(list((ROOT / "docs" / "flowers").glob("*.*")))


def test_no_page_makes_a_browser_ask_another_host(pages):
    """A diagram in Mermaid would load its program from a CDN; so would pictures by address."""
    shown = {name: build.CODE.sub("", text) for name, text in pages.items()}
    assert [name for name, text in pages.items() if re.search(r"^```mermaid", text, re.MULTILINE)] == []
    assert [name for name, text in shown.items() if re.search(r"!\[[^]]*\]\(\w+:|<(script|img|link)", text)] == []
    assert tomllib.loads((ROOT / "docs/site/zensical.toml").read_text())["project"]["theme"]["font"] is False


# Pictures.

PICTURES = sorted((ROOT / "docs" / "pictures").glob("*.svg"))


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.stem)
def test_a_picture_is_shown_says_in_words_what_it_shows_and_has_a_dark_form(picture, site):
    drawn = ElementTree.parse(picture).getroot()
    said = {child.tag.partition("}")[2]: child.text for child in drawn}
    assert said["title"] and len(said["desc"].split()) > 10
    assert "prefers-color-scheme: dark" in said["style"]
    assert f"pictures/{picture.name}" in site["concepts.md"]
    assert re.findall(r"(?:href|src|url)\W+http", picture.read_text()) == []


def test_the_picture_of_the_two_axes_names_every_adapter_and_classifier():
    words = set(re.findall(r"\w+", (ROOT / "docs" / "pictures" / "axes.svg").read_text()))
    assert {*ADAPTERS, *CLASSIFIERS} <= words


# The reference.


def rows(page: str) -> list[tuple[str, ...]]:
    """Setting, default, meaning and what is allowed, of every row of a page's tables."""
    cells = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    return [tuple(cell.strip("` ") for cell in row) for row in cells]


def test_the_reference_has_every_setting_with_default_meaning_and_range(pages):
    told = rows(pages["reference/run-settings.md"])
    expected = [(s.path, s.default, s.description, s.allowed) for s in all_settings()]
    assert sorted(told) == sorted(expected)
    listed = {line.split()[0] for line in lines_of_settings() if line and "    " not in line.split("  ")[0]}
    assert {path for path, *_ in told} >= {path for path in listed if "=" not in path}
    assert [row for row in told if not all(row)] == []


def test_the_reference_has_every_field_of_a_recipe_with_default_meaning_and_range(pages):
    told = {row[0]: row for row in rows(pages["reference/sweep-settings.md"])}
    for setting in settings_of(Sweep):
        if not setting.path.startswith("base."):
            assert told[setting.path.removeprefix("budget.").removeprefix("resources.")][2] == setting.description
    assert set(told) >= {"low", "high", "log", "when", "options", "at_most", "at_least"}
    assert [row for row in told.values() if not all(row)] == []


def everything(name: str, program: typer.Typer) -> set[str]:
    """All options and commands of a program."""
    found, waiting = {name}, [(name, get_command(program))]
    while waiting:
        path, command = waiting.pop()
        found |= {path, *(option for each in command.params for option in each.opts if option.startswith("--"))}
        waiting += [(f"{path} {sub}", each) for sub, each in getattr(command, "commands", {}).items()]
    return found


@pytest.mark.parametrize(("name", "program"), [("inflora", inflora_cli.app), ("sweeps", sweeps_cli.app)])
def test_the_reference_has_every_command_and_option(name, program, pages):
    page = pages[f"reference/{name}.md"]
    assert [each for each in everything(name, program) if f"`{each}`" not in page and f"{each} <" not in page] == []


def test_what_the_reference_shows_of_python_is_defined_where_it_says():
    for name in (each for names in reference.PYTHON.values() for each in names):
        path = ROOT / name.replace(".", "/")
        if not path.is_dir() and not path.with_suffix(".py").exists():
            path = path.parent / "__init__" if path.parent.is_dir() else path.parent
            assert name.rpartition(".")[2] in defined(path.with_suffix(".py").read_text()), name


# What the pages tell readers to write and type.


def block(page: str) -> tuple[str, str]:
    """Name and content of the module that a page shows."""
    return re.search(r"^```python\n# (\w+)\.py\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.M | re.S).groups()


@pytest.fixture
def shown(request, tmp_path, monkeypatch) -> ModuleType:
    """The module of a how-to page, as another package's."""
    name, content = block(request.param)
    (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module(name)
    del sys.modules[name]


def learnt(config: RunConfig, out: Path, settings: type[Alternative], models: dict, monkeypatch, **values: float):
    """The state after a run with somebody's adapter or classifier."""
    name = settings.model_fields["name"].default
    monkeypatch.setitem(models, name, settings)
    kind = "adapter" if models is ADAPTERS else "classifier"
    return train_into(out, override(config, {kind: {"name": name, **values}, "data.tasks": 2}), "validation")


@pytest.mark.parametrize("shown", ["how-to/adapter.md"], indirect=True)
def test_the_adapter_of_the_page_moves_weights_the_less_the_more_it_pulls(shown, tiny, digits, tmp_path, monkeypatch):
    frozen, moved = build_backbone(tiny.backbone).state_dict(), {}
    for pull in (0.0, 100.0):
        out, values = tmp_path / str(pull), {"rank": 4, "pull": pull}
        state = learnt(tiny, out, shown.GentleSettings, ADAPTERS, monkeypatch, **values)
        weights = {name.removeprefix("backbone."): tensor for name, tensor in state.model.items()}
        moved[pull] = sum((tensor - frozen[name]).square().sum().item() for name, tensor in weights.items())
    assert 0 < moved[100.0] < moved[0.0] / 2


@pytest.mark.parametrize("shown", ["how-to/classifier.md"], indirect=True)
def test_the_classifier_of_the_page_learns_digits_and_is_served(shown, tiny, digits, tmp_path, monkeypatch):
    config = override(tiny, {"backbone": {"name": "glyph_vit"}, "adapter": "none"})
    state = learnt(config, tmp_path / "run", shown.DiagonalSettings, CLASSIFIERS, monkeypatch)
    assert state.classifier["variances"].shape == state.classifier["means"].shape
    assert state.metrics(2)["acc/final"] > 0.6
    images = torch.rand(4, 1, 32, 32)
    assert torch.equal(load(tmp_path / "run")(images), load(tmp_path / "run")(images))


@pytest.mark.parametrize("shown", ["how-to/dataset.md"], indirect=True)
def test_the_reader_of_the_page_reads_a_folder_of_images_with_a_table(shown, tmp_path):
    source = tmp_path / "leaves"
    source.mkdir()
    lines = []
    random = np.random.default_rng(0)
    for number, (name, split) in enumerate((n, s) for s in ("train", "test") for n in ("oak", "elm", "oak", "elm")):
        (source / f"{number}.jpg").write_bytes(samples.encoded(number % 2, 2, random))
        lines.append(f"{number}.jpg {name} {split}")
    (source / "labels.txt").write_text("\n".join(lines))
    folder = prepare_store("leaves", Dataset(shown.read, "a folder"), source, Options(), str(tmp_path / "stores"))
    manifest = read_manifest(folder)
    assert list(manifest.classes) == ["elm", "oak"]
    assert {split: list(facts.per_class) for split, facts in manifest.splits.items()} == {
        "train": [2, 2],
        "test": [2, 2],
    }


def test_the_page_to_start_with_types_nothing_that_the_pages_that_are_followed_do_not():
    typed = commands((ROOT / "docs" / "start.md").read_text())
    assert len(typed) > 5
    assert {command.line for command in typed} <= {command.line for command in COMMANDS}


# The notebook.


def test_the_notebook_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"]] == []


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebook_runs_three_trials_and_shows_the_reports_pictures(tmp_path, data_root):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kernel = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    NotebookClient(notebook, timeout=800, resources={"metadata": {"path": str(tmp_path)}}).execute(env=kernel)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    said = "".join(output.text for output in outputs if output.get("name") == "stdout")
    pictures = [output for output in outputs if "application/vnd.plotly.v1+json" in output.get("data", {})]
    assert "finished" in said and "(3/3)" in said
    assert [output for output in outputs if output.output_type == "error"] == []
    # Two of the search, learning, forgetting and three of the memory, three accuracy matrices.
    assert len(pictures) == 10
    assert "<h1>digits-notebook</h1>" in (tmp_path / "report.html").read_text()
