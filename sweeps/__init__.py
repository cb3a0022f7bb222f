"""Search the settings of continual learning on a Ray cluster, with everything recorded in MLflow."""

import os

import inflora.interrupt  # noqa: F401  a recipe's imports take their seconds, and Ctrl-C may come in them

# Read when the libraries are imported, so it must be said before: nobody is told what is run here.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
