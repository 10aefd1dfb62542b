"""Concepts: sliding windows and k-means of their class tokens (3.2)."""
