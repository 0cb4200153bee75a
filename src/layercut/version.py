"""The version of layercut."""

__version__ = "0.1.0"
