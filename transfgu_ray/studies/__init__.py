"""Studies of several runs: sweeps, ablations and comparisons of registered versions."""
