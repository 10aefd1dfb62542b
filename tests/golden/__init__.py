"""Ours against what the published code computes: `python -m tests.golden DIR [--json F]`; see README.md."""
