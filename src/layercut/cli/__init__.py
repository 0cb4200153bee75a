"""The command line: ``layercut run`` and ``layercut recipe``.

Nothing here imports torch or transformers until a command needs them.
"""

from layercut.cli.app import main

__all__ = ["main"]
