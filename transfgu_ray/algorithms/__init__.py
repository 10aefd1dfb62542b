"""The algorithms, in torch, numpy, scipy and FAISS alone: no Ray, no MLflow, no files, no environment variables."""
