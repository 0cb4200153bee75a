"""Which attention kernel a model is built with, and training on a CPU runs through."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from layercut.models.view import DecoderView

LONGEST = 512
"""Tokens up to which plain products are faster: their memory grows with the square of a row."""


def read_attention(config: Any) -> str | dict[str, str] | None:
    """What builds a model with the attention of a loaded one, part by part.

    A vision tower may know fewer kernels than the text decoder beside it.

    Args:
        config: the loaded model's configuration.
    """
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    named = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    whole: str | None = config._attn_implementation
    return {"": whole, **named} if named and whole else whole


@contextlib.contextmanager
def eager(view: DecoderView, seq_len: int) -> Iterator[None]:
    """Compute attention over short rows on a CPU by plain products inside the block.

    They take a third of the time of PyTorch's fused kernel and its backward pass, which would cost
    more than all linear sub-layers; (batch, heads, seq, seq) of every layer are in memory instead.

    Args:
        view: the model.
        seq_len: tokens of the longest row.
    """
    before = view.model.config._attn_implementation
    applies = view.device.type == "cpu" and before == "sdpa" and seq_len <= LONGEST
    if applies:
        view.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if applies:
            view.model.set_attn_implementation(before)
