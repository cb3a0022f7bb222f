"""How the programs end: one line whatever happens, and at once where nothing heavy is needed."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from inflora.config import ConfigError
from inflora.console import OneLineCommand, OneLineGroup
from inflora.errors import one_line
from sweeps import digits
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.space.spec import SPEC_FILE

HEAVY = {"torch", "mlflow", "ray", "timm", "pyarrow", "scipy", "matplotlib"}


def ending(error: BaseException | None, cls=OneLineCommand):
    """What a program whose command raises this leaves: exit code, standard output and error."""
    app = typer.Typer(cls=OneLineGroup) if cls is OneLineGroup else typer.Typer()

    def command(number: int = 0) -> None:
        print("done")
        if error is not None:
            raise error

    app.command()(command) if cls is OneLineGroup else app.command(cls=OneLineCommand)(command)
    if cls is OneLineGroup:
        app.callback()(lambda: None)
    arguments = ["command"] if cls is OneLineGroup else []
    return CliRunner().invoke(app, arguments)


@pytest.fixture(params=[OneLineCommand, OneLineGroup])
def kind(request):
    return request.param


def test_a_command_that_succeeds_says_only_what_it_says(kind):
    result = ending(None, kind)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("error", [ConfigError("no\nsuch  thing"), OSError("no such thing"), FloatingPointError("nan")])
def test_a_user_s_mistake_is_one_line_and_exit_code_two(error, kind):
    result = ending(error, kind)
    assert (result.exit_code, result.stderr) == (2, f"error: {' '.join(str(error).split())}\n")


def test_a_full_gpu_is_one_line_that_says_what_to_try_and_exit_code_two(kind):
    result = ending(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), kind)
    assert (result.exit_code, result.stderr) == (
        2,
        "error: not enough GPU memory; try a smaller optim.batch_size\n",
    )


def test_any_other_error_is_one_line_exit_code_seventy_and_a_file_with_the_traceback(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = ending(KeyError("a\nb"), kind)
    assert result.exit_code == 70
    (line,) = result.stderr.splitlines()
    (file,) = tmp_path.iterdir()
    assert line == f"internal error: KeyError: 'a\\nb'; details in {file}; please report"
    assert "Traceback (most recent call last)" in file.read_text() and "in command" in file.read_text()


def test_the_exit_codes_of_commands_and_of_ctrl_c_stay_theirs(kind):
    assert ending(typer.Exit(3), kind).exit_code == 3
    assert ending(KeyboardInterrupt(), kind).exit_code == 130


@pytest.mark.parametrize("arguments", [["--numbr", "1"], ["--number", "one"], ["too", "many"]])
def test_a_mistyped_command_line_is_one_line_that_says_where_help_is(arguments):
    app = typer.Typer()

    @app.command(cls=OneLineCommand)
    def command(number: int = 0) -> None:
        print(number)

    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert re.fullmatch(r"error: .+ \(see \S+ --help\)\n", result.stderr)


def test_a_very_long_line_is_cut_in_its_middle():
    said = one_line("first " + "x" * 10_000 + " last", longest=100)
    assert len(said) < 120 and said.startswith("first ") and said.endswith(" last")
    assert one_line("as  it\n is") == "as it is"


def started(folder: Path, program: str, *arguments: str) -> tuple[int, set[str]]:
    """Exit code of a program, and the heavy libraries that it has imported by its end."""
    script = (
        f"import atexit, json, sys; sys.argv = {[program, *arguments]}\n"
        f"atexit.register(lambda: open('imported', 'w').write(json.dumps(sorted({HEAVY} & sys.modules.keys()))))\n"
        + (
            f"from {program}.cli import app; app()"
            if program in ("inflora", "sweeps")
            else f"import runpy; runpy.run_path({program!r}, run_name='__main__')"
        )
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert (folder / "imported").exists(), done.stderr
    return done.returncode, set(json.loads((folder / "imported").read_text()))


RECIPE = str(Path(__file__).parents[1] / "sweeps" / "digits.py")


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("line", "code"),
    [
        (["inflora", "--help"], 0),
        (["inflora", "train", "--hlp"], 2),
        (["inflora", "train", "--preset", "cifar100-10", "adapter.rnk=3"], 2),
        (["sweeps", "--help"], 0),
        (["sweeps", "stats"], 2),
        (["sweeps", "status", "nothing"], 2),
        ([RECIPE, "--help"], 0),
        ([RECIPE, "adapter.rnk=3"], 2),
    ],
)
def test_help_and_a_mistyped_word_wait_for_no_library(line, code, tmp_path):
    assert started(tmp_path, *line) == (code, set())


@pytest.mark.e2e
def test_the_status_of_a_sweep_waits_for_no_library(tmp_path):
    folder = tmp_path / "results" / "digits-frozen"
    Ledger(digits.frozen, folder).propose()
    (folder / SPEC_FILE).write_text(digits.frozen.model_dump_json())
    assert started(tmp_path, "sweeps", "status", "digits-frozen") == (0, set())


INTERRUPTED = {
    "in a command": "app()",
    "in an import of a command, which lets no exception out": "app(['imports'])",
    "outside of any": "raise KeyboardInterrupt",
    "in a callback, which Python cannot stop": "kept = weakref.ref(Thing(), lambda _: interrupted()); time.sleep(9)",
}
HEAD = """
import os, signal, sys, threading, time, weakref, typer
from inflora.console import OneLineGroup
app = typer.Typer(cls=OneLineGroup)

class Thing: pass

def interrupted():
    raise KeyboardInterrupt

@app.callback(invoke_without_command=True)
def interrupt(context: typer.Context):
    if not context.invoked_subcommand:
        interrupted()

@app.command()
def imports():
    sys.path.insert(0, ".")
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    import stubborn
    print("it went on", file=sys.stderr)
"""
STUBBORN = """
import time
try:
    time.sleep(9)
except BaseException:
    pass
"""


@pytest.mark.parametrize("where", INTERRUPTED)
def test_ctrl_c_is_one_line_wherever_it_falls(where, tmp_path):
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    script = HEAD + INTERRUPTED[where]
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stderr == "interrupted\n"
    assert done.returncode in (130, -signal.SIGINT)


BY_HAND = """
from importlib.util import module_from_spec, spec_from_file_location

@app.command()
def migrates():
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    spec = spec_from_file_location("migration", "migration.py")
    spec.loader.exec_module(module_from_spec(spec))

app(["migrates"])
"""


def test_ctrl_c_in_a_module_that_a_library_runs_as_its_work_lets_that_tidy_up(tmp_path):
    (tmp_path / "migration.py").write_text("import time\ntry:\n    time.sleep(9)\nfinally:\n    open('tidied', 'w')\n")
    line = [sys.executable, "-c", HEAD + BY_HAND]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    assert (tmp_path / "tidied").exists()
