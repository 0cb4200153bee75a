"""Types of layers: what a configuration says of each, and what a reader derives without it."""

from __future__ import annotations

from typing import Any

from layercut.checkpoints.hf_calls import guard
from layercut.errors import ModelError

PER_LAYER = (
    "layer_types",
    "no_rope_layers",
    "mlp_layer_types",
    "layers_block_type",
    "block_types",
    "activation_sparsity_pattern",
)
"""Keys of a configuration with one entry per layer that transformers derives if they are absent."""


LayerTypes = tuple[tuple[Any, ...], ...]
"""Per layer, its entries of all those keys."""


def read_layer_types(text: Any) -> LayerTypes:
    """What a text configuration says of each of its layers.

    Args:
        text: a transformers configuration of a text decoder.
    """
    values = [read_entries(text, key) for key in PER_LAYER]
    return tuple(zip(*(value for value in values if value), strict=True))


def derive_layer_types(text: Any) -> LayerTypes:
    """What a reader makes of the same configuration without those keys.

    Nothing where none can be derived: the lists may be all that a configuration rightly gives.
    """
    try:
        with guard("config.json", ModelError, "Restore the original configuration."):
            content = {key: value for key, value in text.to_dict().items() if key not in PER_LAYER}
            fresh = type(text).from_dict(content)
    except ModelError:
        return ()
    values = [read_entries(fresh, key) for key in PER_LAYER if read_entries(text, key)]
    if not all(values):
        return ()
    return tuple(zip(*values, strict=True))


def read_entries(text: Any, key: str) -> list[Any]:
    """A per-layer list of a text configuration; empty if it has no such list of that length."""
    value = getattr(text, key, None)
    n_layers = getattr(text, "num_hidden_layers", None)
    return list(value) if isinstance(value, list | tuple) and len(value) == n_layers else []
