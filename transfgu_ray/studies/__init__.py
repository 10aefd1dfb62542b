"""Many runs: sweeps, ablations and the comparison of registered versions."""
