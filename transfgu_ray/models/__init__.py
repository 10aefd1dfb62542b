"""Weights and what they mean: the finished model, its encoder, the names of its concepts."""
