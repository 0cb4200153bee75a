"""One selection strategy per file; the folder is the registry."""
