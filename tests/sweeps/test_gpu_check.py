"""``sweeps gpu-check``: what it shows, where tracebacks go, its exit codes; the whole of it rehearsed on the CPU."""

import io
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from sweeps import cli
from sweeps.engine.run import gpu_check
from tests import planted

NOTHING_WRONG = {"first": planted.passes, "other": planted.has_nothing_to_try}
SOMETHING_WRONG = {"sums": planted.breaks, "losses": planted.finds_something, **NOTHING_WRONG}


@pytest.fixture
def typed(monkeypatch, tmp_path):
    """Type the command, with these checks in the place of the real ones."""

    def command(checks, device="cpu"):
        monkeypatch.setattr(gpu_check, "ALL_CHECKS", checks)
        return CliRunner().invoke(cli.app, ["gpu-check", "--device", device, "--storage", str(tmp_path)])

    return command


def test_each_check_is_a_line_and_all_that_passed_is_success(typed, tmp_path):
    done = typed(NOTHING_WRONG)
    title, first, other, end = done.stdout.splitlines()
    assert f"PyTorch {torch.__version__}" in title
    assert first.split() == ["passed", "first", first.split()[2], "s", *["all", "is", "well", "on", "cpu"]]
    assert other.startswith("not tried  other") and other.endswith("1 GPU")
    assert end.startswith("1 passed, 1 not tried in ")
    assert done.exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_a_failed_check_is_a_line_a_traceback_in_a_file_and_exit_code_1(typed, tmp_path):
    done = typed(SOMETHING_WRONG)
    _, sums, losses, *others, end, where = done.stdout.splitlines()
    assert sums.startswith("FAILED     sums") and sums.endswith("CUDA error: no kernel image is available")
    assert losses.startswith("FAILED     losses") and losses.endswith("the loss is nan")
    assert len(others) == 2, "what comes after runs all the same"
    assert end.startswith("1 passed, 2 FAILED, 1 not tried in ")
    assert where == f"what sums, losses printed is in {tmp_path / 'gpu-check.log'}"
    log = (tmp_path / "gpu-check.log").read_text()
    assert log.count("Traceback") == 2 and "planted.py" in log
    assert "Traceback" not in done.output
    assert done.exit_code == 1


def test_a_terminal_shows_one_table(typed, monkeypatch):
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, force_interactive=True, width=150)
    monkeypatch.setattr(gpu_check, "Console", lambda: terminal)
    done = typed({**SOMETHING_WRONG, "[odd]": planted.passes})
    assert done.exit_code == 1
    assert len(done.stdout.splitlines()) == 2, "the counts, and where the tracebacks are"
    last = shown.getvalue().rsplit("GPU check: ", 1)[1]
    for name in ("sums", "losses", "first", "other", "[odd]", "no kernel image is available", "1 GPU"):
        assert last.count(name) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_cuda_device_one_line_says_what_there_is_and_the_exit_code_is_2(typed):
    done = typed(NOTHING_WRONG, device="cuda")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: PyTorch finds no CUDA device here (")
    assert f"CUDA {torch.version.cuda}, PyTorch {torch.__version__}" in line.replace("no CUDA,", "CUDA None,")
    assert (done.exit_code, done.stdout) == (2, "")


def test_another_device_is_refused(typed):
    done = typed(NOTHING_WRONG, device="tpu")
    assert (done.exit_code, done.stderr) == (2, "error: --device must be cuda or cpu, got 'tpu'\n")


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_the_whole_of_it_passes_on_the_cpu(tmp_path):
    command = [sys.executable, "-m", "sweeps.cli", "gpu-check", "--device", "cpu", "--storage", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    _, *lines, end = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["passed"] * len(gpu_check.ALL_CHECKS), done.stdout
    assert end.startswith(f"{len(gpu_check.ALL_CHECKS)} passed in ")
    assert "for 0 s" not in lines[-1], "the two trials ran at a time"
    assert (done.returncode, done.stderr) == (0, "")
