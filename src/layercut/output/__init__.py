"""The pruned checkpoint: written, and compared with the model in memory."""
