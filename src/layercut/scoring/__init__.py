"""Layer importance: one number per layer, higher = keep, read-only on the model."""
