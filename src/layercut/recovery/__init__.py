"""Repair of the kept weights: a patch of named tensors, read-only on the model."""
