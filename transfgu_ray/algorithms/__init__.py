"""torch, numpy, scipy and FAISS only: nothing here imports Ray or MLflow, writes files or reads the environment."""
