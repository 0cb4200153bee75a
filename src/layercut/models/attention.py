"""Which attention kernel training on a CPU runs through."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from layercut.models.view import DecoderView

LONGEST = 512
"""Tokens up to which plain products are faster: their memory grows with the square of a row."""


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
