"""Search the settings of continual learning on a Ray cluster, with everything recorded in MLflow."""

import os
import sys
from types import TracebackType

# Read when the libraries are imported, so it must be said before: nobody is told what is run here.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

_show = sys.excepthook


def _show_a_stop_in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        _show(kind, error, trace)


# Ctrl-C may come while a recipe's imports take their seconds, before any command could catch it.
sys.excepthook = _show_a_stop_in_one_line
