"""Prediction of the cost of a run."""
