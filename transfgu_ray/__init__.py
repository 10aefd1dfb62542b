"""Unsupervised semantic segmentation from unlabelled photographs (TransFGU, ECCV 2022) on Ray."""

__version__ = "0.1.0"
