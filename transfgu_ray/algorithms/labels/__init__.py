"""Pseudo-labels: the response maps of concepts, and their form in the pseudo-label bank (3.2)."""
