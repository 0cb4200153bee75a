"""From a name or folder to a model whose layers can be dropped, and back to files."""
