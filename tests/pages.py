"""The parts of docs/architecture.md that are read from the code: tree of modules, lines of its walks, table of metrics.

python -m tests.pages     writes them anew
"""

import ast
import re
from pathlib import Path

from inflora.metrics import ALIASES

ROOT = Path(__file__).parents[1]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
TREE = re.compile(r"(?<=^```text\n)inflora/.*?(?=^```$)", re.MULTILINE | re.DOTALL)
METRICS = re.compile(r"(?<=^\| metric \| in papers \| formula \|\n\|---\|---\|---\|\n)(?:\|.*\n)*", re.MULTILINE)
STEP = re.compile(r"`([\w/]+\.py):(\d+) ([\w.]+)`")


def tree(root: Path = ROOT) -> str:
    """Every module of the project beside the first line of its docstring, folder after folder."""
    lines: list[str] = []
    for package in ("inflora", "sweeps"):
        _add_folder(root / package, depth=0, lines=lines)
    return "".join(f"{line}\n" for line in lines)


def _add_folder(folder: Path, depth: int, lines: list[str]) -> None:
    lines.append(_entry(f"{folder.name}/", folder / "__init__.py", depth))
    lines += [
        _entry(file.name, file, depth + 1) for file in sorted(folder.glob("*.py")) if not file.stem.startswith("__")
    ]
    for init in sorted(folder.glob("*/__init__.py")):
        _add_folder(init.parent, depth + 1, lines)


def _entry(name: str, file: Path, depth: int) -> str:
    said = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]
    return f"{'  ' * depth}{name}".ljust(28) + f" {said}"


def metric_rows() -> str:
    """A row for every metric: its name here, its names in papers, its formula."""
    rows = [
        (f"`{each.here}`", each.field, f"`{each.formula}`" + (f"; {each.note}" if each.note else ""))
        for each in ALIASES
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def defined(source: str) -> dict[str, int]:
    """The line on which each class, function, method and module-level name of a file is defined."""
    found: dict[str, int] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.setdefault(prefix + node.name, node.lineno)
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign) and not prefix:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update({target.id: node.lineno for target in targets if isinstance(target, ast.Name)})

    visit(ast.parse(source).body, "")
    return found


def with_lines(page: str, root: Path = ROOT) -> str:
    """The page with every step ``path.py:line name`` at the line it has now; 0 where the file defines no such name."""

    def now(step: re.Match[str]) -> str:
        path, _, name = step.groups()
        file = root / path
        line = defined(file.read_text()).get(name, 0) if file.exists() else 0
        return f"`{path}:{line} {name}`"

    return STEP.sub(now, page)


def main() -> None:
    """Write tree, lines and metrics of docs/architecture.md anew; names that are gone are said."""
    page = with_lines(TREE.sub(lambda _: tree(), ARCHITECTURE.read_text()))
    page = METRICS.sub(lambda _: metric_rows(), page)
    ARCHITECTURE.write_text(page)
    for path, line, name in STEP.findall(page):
        if line == "0":
            print(f"docs/architecture.md: {path} defines no {name}")


if __name__ == "__main__":
    main()
