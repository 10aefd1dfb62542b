"""Pseudo-labels: response maps of concepts, and the bank that stores them (3.2)."""
