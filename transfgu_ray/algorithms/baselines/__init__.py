"""Baselines on the same frozen encoder as the method."""
