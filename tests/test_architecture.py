"""What the files may import: arrows point down, the core knows no cluster, recipes are values."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module imports only from floors below its own; modules of one package may share a floor and import each other.
FLOORS = {
    0: (
        "inflora.errors",
        "inflora.files",
        "inflora.interrupt",
        "inflora.patience",
        "inflora.distributed",
        "inflora.eigen",
        "inflora.metrics",
    ),
    1: ("inflora.config", "inflora.console", "sweeps"),
    2: (
        "inflora.subspace",
        "inflora.gaussians",
        "inflora.data",
        "inflora.layout",
        "inflora.lora",
        "inflora.precision",
        "inflora.pretrained",
        "inflora.state",
        "inflora.storage",
        "inflora.presets",
        "inflora.cuda",
        "inflora.isolated",
    ),
    3: (
        "inflora.attention",
        "inflora.class_token",
        "inflora.covariance",
        "inflora.peft_export",
        "inflora.drift",
        "inflora.draws",
        "inflora.right_answers",
        "inflora.predictions",
        "inflora.reproduction",
    ),
    4: ("inflora.backbone", "inflora.collection", "inflora.probe", "inflora.prompts", "inflora.task_data"),
    5: ("inflora.features", "inflora.injection"),
    6: ("inflora.classifiers",),
    7: ("inflora.model",),
    8: ("inflora.adapters",),
    9: ("inflora.training", "inflora.learner", "inflora.replay"),
    10: ("inflora.integrity", "inflora.forward_transfer"),
    11: ("inflora.setup",),
    12: ("inflora.continual", "inflora.serving"),
    # The core's own tools, and whoever else uses it.
    13: ("inflora.runs",),
    14: (
        "inflora",
        "inflora.reproduce",
        "inflora.gpu_check",
        "sweeps.engine.ledger.failures",
        "sweeps.engine.ledger.lock",
    ),
    15: (
        "inflora.cli",
        "sweeps.engine.ledger.bill",
        "sweeps.engine.ledger.database",
        "sweeps.engine.ledger.records",
        "sweeps.engine.ledger.lease",
        "sweeps.engine.ledger.snapshot",
        "sweeps.engine.run.actors",
        "sweeps.engine.run.gpu_use",
        "sweeps.engine.run.nodes",
        "sweeps.engine.run.project",
        "sweeps.engine.run.session",
        "sweeps.engine.show.output",
        "sweeps.engine.show.pieces",
        "sweeps.engine.show.plots",
        "sweeps.engine.space.domains",
        "sweeps.engine.space.gaussian_process",
    ),
    16: (
        "sweeps.engine.run.reach",
        "sweeps.engine.run.reports",
        "sweeps.engine.show.scales",
        "sweeps.engine.space.cube",
        "sweeps.engine.space.objectives",
    ),
    17: (
        "sweeps.engine.show.inputs",
        "sweeps.engine.show.mlflow_database",
        "sweeps.engine.space.acquisition",
        "sweeps.engine.space.spec",
    ),
    18: (
        "sweeps.engine.ledger.trials",
        "sweeps.engine.run.cluster",
        "sweeps.engine.run.machines",
        "sweeps.engine.run.smoke",
        "sweeps.engine.run.trial",
        "sweeps.engine.show.tracking",
        "sweeps.engine.space.early_stopping",
        "sweeps.engine.space.estimate",
        "sweeps.engine.space.samplers",
    ),
    19: (
        "sweeps.engine.show.decision",
        "sweeps.engine.show.description",
        "sweeps.engine.show.surface",
        "sweeps.engine.space.budget",
    ),
    20: (
        "sweeps.engine.ledger.consistency",
        "sweeps.engine.run.waiting",
        "sweeps.engine.run.driver",
        "sweeps.engine.show.mlflow_store",
        "sweeps.engine.show.mlflow_estimates",
        "sweeps.engine.show.status",
    ),
    21: ("sweeps.engine.ledger.study", "sweeps.engine.show.tables"),
    22: (
        "sweeps.engine.ledger.ledger",
        "sweeps.engine.ledger.reading",
        "sweeps.engine.run.preflight",
        "sweeps.engine.show.report",
    ),
    23: ("sweeps.engine.show.mirror", "sweeps.engine.show.progress"),
    24: ("sweeps.engine.run.storage", "sweeps.engine.run.watch"),
    25: ("sweeps.engine.run.placement", "sweeps.engine.run.tune"),
    26: ("sweeps.engine.run.runner", "sweeps.engine.after.export", "sweeps.engine.after.final"),
    27: (
        "sweeps.engine.after.judge",
        "sweeps.engine.after.transfer",
        "sweeps.engine.run.dry_run",
        "sweeps.engine.run.gpu_check",
    ),
    28: ("sweeps.engine.after.transferred",),
    29: ("sweeps.cli",),
    30: ("sweeps.recipe",),
}
ON_FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
PACKAGES = ("inflora.config", "inflora.data", "inflora.adapters", "inflora.classifiers")
RECIPES_FLOOR = 31


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the project."""
    files = [file for package in ("inflora", "sweeps") for file in sorted((ROOT / package).rglob("*.py"))]
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}
    return {name.removesuffix(".__init__"): file for file, name in names.items()}


MODULES = modules()
RECIPES = sorted(
    f"sweeps.{file.stem}" for file in (ROOT / "sweeps").glob("*.py") if file.stem not in ("__init__", "cli", "recipe")
)


def imports(name: str) -> set[str]:
    """The project's modules that a module imports, anywhere in its file."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute here"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {part if part in MODULES else str(node.module) for part in parts}
    return {module for module in found if module.split(".")[0] in ("inflora", "sweeps")}


def package(name: str) -> str:
    """The package that shares one floor, or the module itself."""
    return next((p for p in PACKAGES if name == p or name.startswith(f"{p}.")), name)


def floor(name: str) -> int | None:
    return RECIPES_FLOOR if name in RECIPES else ON_FLOOR.get(package(name))


def test_every_module_has_its_floor():
    empty = {name for name, file in MODULES.items() if file.name == "__init__.py" and not imports(name)}
    assert {name for name in MODULES if floor(name) is None} - empty == set()
    assert set(ON_FLOOR) <= set(MODULES) | set(PACKAGES)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_import_points_up(name):
    for imported in imports(name):
        assert imported in MODULES, f"{name} imports {imported}, which is no module"
        if package(imported) != package(name):
            assert floor(imported) < floor(name), f"{name} (floor {floor(name)}) imports {imported}"


def test_no_two_modules_import_each_other():
    tuple(TopologicalSorter({name: imports(name) - {name} for name in MODULES}).static_order())


def run_python(script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], cwd=cwd, capture_output=True, text=True, check=False)


def test_the_core_can_be_imported_where_ray_optuna_and_mlflow_cannot(tmp_path):
    core = [name for name in MODULES if name.startswith("inflora.")]
    script = f"""
import importlib, sys
for name in ("ray", "optuna", "mlflow"):
    sys.modules[name] = None
for name in {core}:
    importlib.import_module(name)
print([name for name in sys.modules if name.split(".")[0] == "sweeps"])
"""
    done = run_python(script, tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_what_stands_before_a_trial_s_worker_and_beside_the_driver_starts_without_torch(tmp_path):
    script = """
import sys
from sweeps.engine.run import driver
from sweeps.engine.show import mirror
from sweeps.engine.space.spec import Resources
driver.train_driver(Resources(), "cpu", "somewhere", beside=True)
driver.worker_backend(Resources(), "gloo")
print("torch" in sys.modules)
"""
    done = run_python(script, tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_there_is_a_recipe():
    assert "sweeps.digits" in RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_values_only(name):
    made = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert [node.lineno for node in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(node, made)] == []


def test_nothing_beside_the_recipes_bears_the_name_of_something_importable(tmp_path):
    """``python sweeps/x.py`` puts ``sweeps/`` first on the import path."""
    beside = [path for path in (ROOT / "sweeps").iterdir() if path.suffix in ("", ".py")]
    names = {path.stem for path in beside if not path.name.startswith("__")}
    script = f"import importlib.util as u; print([n for n in {sorted(names)} if u.find_spec(n)])"
    done = run_python(script, tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
    assert not names & sys.stdlib_module_names
