"""GGUF files: read whole, converted to a checkpoint, or pruned as they are."""
