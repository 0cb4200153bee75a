"""One recovery method per file; the folder is the registry."""
