"""The ends of a command: done, one line about a mistake that a user can mend, or one about one that only we can."""

import os
import platform
import sys
import tempfile
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from typer import BadParameter, Exit, Option
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import Abort, TyperException

from inflora.errors import UserError, one_line
from inflora.interrupt import INTERRUPTED, ctrl_c_ends_imports

MENDABLE = 2
INTERNAL = 70  # EX_SOFTWARE of sysexits.h


def path(text: str) -> Path:
    """The path that an option gives (its ``parser``); an empty one would be the working folder without a word."""
    if not str(text).strip():
        raise BadParameter("a path must not be empty")
    return Path(text)


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"inflora-sweeps {version('inflora-sweeps')}")
        raise Exit


Version = Annotated[bool, Option("--version", callback=_say_version, is_eager=True, help="Say the version and end.")]
"""The option of a program that ends it with a line: the version of what is installed, as pyproject.toml has it."""


class _EndsInOneLine:
    """A command whose every mistake is one line on stderr: exit code 2, or 70 for ours, and never a traceback."""

    def main(self, *args: Any, **extra: Any) -> None:
        """Parse the command line, run the command and exit."""
        with ctrl_c_ends_imports():
            code = self._exit_code(*args, **{**extra, "standalone_mode": False})
        sys.exit(code)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; Ctrl-C ends it with one line."""
        try:
            return super().invoke(ctx)  # type: ignore[misc]
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise Exit(INTERRUPTED) from None

    def _exit_code(self, *args: Any, **extra: Any) -> int:
        try:
            return super().main(*args, **extra) or 0  # type: ignore[misc]
        except TyperException as error:
            return _usage(error)
        except BrokenPipeError:  # who reads the output has seen enough; what is left of it goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except (UserError, FloatingPointError, OSError) as error:
            print(f"error: {one_line(str(error))}", file=sys.stderr)
            return MENDABLE
        except Abort:
            return 1
        except Exception as error:  # the last resort
            if _is_gpu_full(error):
                print("error: not enough GPU memory; try a smaller optim.batch_size", file=sys.stderr)
                return MENDABLE
            print(_report(error), file=sys.stderr)
            return INTERNAL


class OneLineGroup(_EndsInOneLine, TyperGroup):
    """``typer.Typer(cls=OneLineGroup)``: a program of several commands."""


class OneLineCommand(_EndsInOneLine, TyperCommand):
    """``app.command(cls=OneLineCommand)``: a program of one."""


def _usage(error: TyperException) -> int:
    """A command line that cannot be read; without any arguments the help is the answer."""
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message)
        return MENDABLE
    context = getattr(error, "ctx", None)
    where = f" (see {context.command_path} --help)" if context else ""
    print(f"error: {one_line(message).rstrip('.')}{where}", file=sys.stderr)
    return MENDABLE


def _is_gpu_full(error: Exception) -> bool:
    """True of PyTorch's error about it, which nothing raises where torch is not imported."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _report(error: Exception) -> str:
    """One line for the terminal; the traceback is in a file of its own."""
    descriptor, path = tempfile.mkstemp(prefix="inflora-error-", suffix=".txt")
    with os.fdopen(descriptor, "w", errors="backslashreplace") as details:
        details.write(f"{sys.argv}\nPython {sys.version}, {platform.platform()}\n\n")
        traceback.print_exception(error, file=details)
    name = type(error).__name__
    return f"internal error: {one_line(f'{name}: {error}', 300)}; details in {path}; please report"
