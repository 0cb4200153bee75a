"""Counts in a config.json that no model has: refused before a library builds lists of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from layercut.checkpoints.families import LAYER_COUNTS, MTP_COUNTS
from layercut.errors import ModelError

MAX_COUNT = 10_000
"""More layers, experts or heads than any model has."""
COUNTED = re.compile(r"(num|n)_(\w+_)?(layers?|blocks?|experts?|heads?)|(moe|mtp)_num_\w+|depth")


def check_counts(raw: Mapping[str, Any]) -> None:
    """Refuse counts of layers, experts and heads that would take minutes and gigabytes to build.

    transformers derives lists of a configuration's counts when it reads them.

    Args:
        raw: a parsed config.json.

    Raises:
        ModelError: a number of layers is none, or a count is beyond any model's.
    """
    for key, value in _walk(raw):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and COUNTED.fullmatch(key) and not abs(value) <= MAX_COUNT:
            raise ModelError(
                f"config.json says {key} = {value}, and no model has more than {MAX_COUNT:,}. "
                "Restore the original configuration."
            )
        least = 1 if key in LAYER_COUNTS else 0 if key in MTP_COUNTS else None
        if least is not None and value is not None and (type(value) is not int or value < least):
            raise ModelError(
                f"config.json says {key} = {value!r}, which is no number of layers. "
                "Restore the original configuration."
            )


def check_layer_count(raw: Mapping[str, Any], n_tensors: int) -> None:
    """Refuse more layers than there are tensors, before the layers are built.

    Args:
        raw: a parsed config.json.
        n_tensors: how many the checkpoint stores; a layer has at least one.

    Raises:
        ModelError: config.json counts more layers.
    """
    for key, value in _walk(raw):
        if key in LAYER_COUNTS and isinstance(value, int) and value > n_tensors:
            raise ModelError(
                f"config.json says {key} = {value}, the weights hold {n_tensors} tensors. "
                "Use the configuration that belongs to these weights."
            )


def _walk(part: Any) -> Iterator[tuple[str, Any]]:
    """Every key of an object and of the objects inside, with its value."""
    if isinstance(part, Mapping):
        for key, value in part.items():
            yield str(key), value
            yield from _walk(value)
    elif isinstance(part, list):
        for value in part:
            if isinstance(value, Mapping | list):
                yield from _walk(value)
