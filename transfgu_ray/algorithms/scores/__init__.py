"""Scores of segmentations, with and without labels."""
