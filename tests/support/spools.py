"""Rows as the fits read them."""

from __future__ import annotations

import torch

from layercut.spool import Spool


def spool(rows: torch.Tensor) -> Spool:
    """``rows`` as a spool that is filled."""
    filled = Spool(*rows.shape)
    filled.write(0, rows)
    return filled
