"""A model as files and configuration; nothing is loaded."""
