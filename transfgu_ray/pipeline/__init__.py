"""The stages on Ray and MLflow: each module reads artifacts, combines algorithms and writes results."""
