"""The only room with MLflow: runs, sweeps and the model registry."""
