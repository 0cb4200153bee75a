"""Perplexity over non-overlapping windows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layercut import progress
from layercut.engine.loss import _finite, check_vocabulary, token_losses
from layercut.results import Estimate, estimate_mean

if TYPE_CHECKING:
    from layercut.models.view import DecoderView


def perplexity(view: DecoderView, windows: Tensor) -> Estimate:
    """Exponential of the mean cross-entropy of every token of every window but its first.

    Args:
        view: the model.
        windows: token ids, (n, seq_len).

    Returns:
        The perplexity and its standard error over windows (delta method: ppl × se of the mean
        loss; 0 for a single window, which shows no spread); ``n`` is the number of tokens scored,
        ``losses`` has every window's mean.

    Raises:
        DataError: a token id is outside the model's vocabulary.
        NumericsError: the loss is not finite.
    """
    check_vocabulary(view, windows)
    parts = progress.track(token_losses(view, windows, 2), -(-len(windows) // 2))
    losses = torch.cat(list(parts)).double().cpu()
    per_window = losses.mean(dim=1)
    ppl = math.exp(_finite(float(losses.mean())))
    error = ppl * estimate_mean(per_window).stderr
    return Estimate(ppl, error, n=losses.numel(), losses=tuple(per_window.tolist()))
