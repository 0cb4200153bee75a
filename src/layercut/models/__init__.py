"""From a name or folder to a model whose layers can be dropped, and back to files."""

# The embedded model's earlier name, for one release.
from layercut.checkpoints import embedded_model as embedded

__all__ = ["embedded"]
