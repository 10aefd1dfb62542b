"""Frozen encoders (vision transformers and ResNet-50) and their checkpoints."""
