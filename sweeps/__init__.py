"""Search the settings of continual learning on a Ray cluster, with everything recorded in MLflow."""
