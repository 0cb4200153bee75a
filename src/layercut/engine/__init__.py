"""The residual stream of a whole calibration set, and its gradients, one layer at a time."""
