"""One scoring method per file; the folder is the registry."""
