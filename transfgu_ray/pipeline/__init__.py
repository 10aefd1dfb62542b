"""Ray and MLflow: each module reads artifacts, wires algorithms together and commits. Nothing here does arithmetic."""
