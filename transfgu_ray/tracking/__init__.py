"""MLflow, used only here: runs, sweeps and the model registry."""
