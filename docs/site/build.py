"""The documentation's site: pages of this repository and generated ones, gathered and given to Zensical.

python -m docs.site.build     writes build/site/html; a link that leads nowhere fails it
"""

import json
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from docs.site.reference import PAGES

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
OUT = ROOT / "build" / "site"
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
PICTURES = (".png", ".svg")
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")

# Section -> pages in their order. What is not named follows: in the section called like its folder, or in the last.
SECTIONS = {
    "Start": ["index.md", "start.md", "digits.md"],
    "Concepts": ["concepts.md", "architecture.md"],
    "How-to": ["how-to/dataset.md", "how-to/adapter.md", "how-to/classifier.md", "cluster.md", "data.md", "gpu.md"],
    "Reference": list(PAGES),
    "Results": ["results.md", "results/reproduced.md"],
    "Search": ["search.md"],
    "Faults": ["faults.md"],
    "More": [],
}
# Titles in the navigation where a page's own says too little there.
TITLES = {"index.md": "Home", "cluster.md": "Your cluster, SLURM", "reference/recipe.md": "recipes"}
# Pages whose places on the site are not those below docs/.
ELSEWHERE = {
    "README.md": "index.md",  # which says the same, and more
    "docs/site/index.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "cluster/README.md": "cluster.md",
}


def place(path: str) -> str:
    """Where a file of the repository is on the site; files of code, and folders, are pages that show them."""
    if path in ELSEWHERE:
        return ELSEWHERE[path]
    if path.endswith((".md", ".ipynb", *PICTURES)):
        return path.removeprefix("docs/").removeprefix("site/").replace(".ipynb", ".md")
    return f"source/{path}.md"


def with_links(text: str, path: str, named: Callable[[str], None]) -> str:
    """The text of the repository's file ``path`` with its links as they are on the site; ``named`` hears of each."""
    here = posixpath.dirname(place(path))

    def moved(link: re.Match[str]) -> str:
        target, hash_, anchor = link[1].partition("#")
        if not target or ":" in target:
            return link[1]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        named(file)
        return posixpath.relpath(place(file), here or ".") + hash_ + anchor

    parts = CODE.split(text)
    return "".join(part if index % 2 else LINK.sub(moved, part) for index, part in enumerate(parts))


def notebook(content: str) -> str:
    """A notebook as a page: its text, and its code in fences."""
    shown = {"markdown": "{}", "code": "```python\n{}\n```"}
    cells = json.loads(content)["cells"]
    return "\n\n".join(shown[cell["cell_type"]].format("".join(cell["source"])) for cell in cells) + "\n"


def source(file: Path, path: str) -> str:
    """A page that shows a file, or all files of a folder."""
    files = sorted(each for each in file.iterdir() if each.is_file()) if file.is_dir() else [file]
    kinds = {".py": "python", ".yaml": "yaml"}
    # Four backticks: code may hold three.
    fences = [f'````{kinds.get(each.suffix, "text")} title="{each.name}"\n{each.read_text()}````' for each in files]
    return "\n\n".join([f"# {path}", *fences]) + "\n"


def gather(root: Path = ROOT) -> dict[str, str | bytes]:
    """Place -> content of every page, picture and source file of the site: docs/, and whatever is linked from there.

    Raises:
        ValueError: A link leads to no file.
    """
    site: dict[str, str | bytes] = {name: write() for name, write in PAGES.items()}
    docs = sorted(each for kind in ("*.md", "*.ipynb") for each in (root / "docs").rglob(kind))
    waiting = [each.relative_to(root).as_posix() for each in docs]
    waiting += [path for path in ELSEWHERE if path != "README.md" and (root / path).exists()]
    for path in waiting:  # grows as links are found
        if place(path) not in site:
            site[place(path)] = _content(root, path, waiting)
    return site


def _content(root: Path, path: str, linked: list[str]) -> str | bytes:
    file = root / path

    def named(other: str) -> None:
        if not (root / other).exists() and place(other) not in PAGES:
            raise ValueError(f"{path}: there is no {other}")
        if place(other) not in PAGES:
            linked.append(other)

    if file.suffix in PICTURES:
        return file.read_bytes()
    if file.is_dir() or file.suffix not in (".md", ".ipynb"):
        return source(file, path)
    text = file.read_text()
    return with_links(notebook(text) if file.suffix == ".ipynb" else text, path, named)


def navigation(pages: Iterable[str]) -> dict[str, list[str]]:
    """Section -> pages: those that ``SECTIONS`` names, then the others."""
    sections = {name: [page for page in named if page in pages] for name, named in SECTIONS.items()}
    placed = {page for named in SECTIONS.values() for page in named}
    for page in sorted(set(pages) - placed):
        folder = page.partition("/")[0]
        section = next((name for name in SECTIONS if name.lower() == folder), list(SECTIONS)[-1])
        sections[section].append(page)
    return {name: found for name, found in sections.items() if found}


def configuration(site: Iterable[str]) -> str:
    """Zensical's, with the navigation in it."""
    listed = [name for name in site if name.endswith(".md") and not name.startswith("source/")]
    sections = [_entry(name, f"[{', '.join(map(_item, pages))}]") for name, pages in navigation(listed).items()]
    return (HERE / "zensical.toml").read_text().replace("nav = []", f"nav = [{', '.join(sections)}]", 1)


def _item(page: str) -> str:
    return _entry(TITLES[page], json.dumps(page)) if page in TITLES else json.dumps(page)


def _entry(name: str, what: str) -> str:
    return f"{{ {json.dumps(name)} = {what} }}"  # TOML writes text as JSON does


def main() -> int:
    """Write the site; the exit code of Zensical, which is not 0 where a link or an anchor leads nowhere."""
    try:
        site = gather()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shutil.rmtree(OUT, ignore_errors=True)
    for name, content in site.items():
        file = OUT / "pages" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    shutil.copy(HERE / "site.css", OUT / "pages")
    (OUT / "zensical.toml").write_text(configuration(site))
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(OUT / "zensical.toml")]
    code = subprocess.run(command, cwd=OUT, check=False).returncode
    if code == 0:
        print(f"open {(OUT / 'html' / 'index.html').relative_to(ROOT)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
