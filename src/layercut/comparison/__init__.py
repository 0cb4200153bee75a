"""Every method side by side, on one model, text and budget."""
