"""The views of a sweep: MLflow, lines and tables on a terminal, one HTML page."""
