"""Perplexity over non-overlapping windows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layercut import progress
from layercut.engine.loss import _finite, check_vocabulary, token_losses
from layercut.errors import DataError
from layercut.results import Estimate, estimate_mean

if TYPE_CHECKING:
    from layercut.models.view import DecoderView


def perplexity(view: DecoderView, windows: Tensor) -> Estimate:
    """Exponential of the mean cross-entropy of every token of every window but its first.

    Every rank computes its share of the windows, and all have the estimate.

    Args:
        view: the model.
        windows: token ids, (n, seq_len).

    Returns:
        The perplexity and its standard error over windows (delta method: ppl × se of the mean
        loss; 0 for a single window, which shows no spread); ``n`` is the number of tokens scored,
        ``losses`` has every window's mean.

    Raises:
        DataError: a token id is outside the model's vocabulary, or another rank has other windows.
        NumericsError: the loss is not finite.
    """
    check_vocabulary(view, windows)
    view.ranks.check_same("evaluation text", str(windows.tolist()), DataError)
    ranks = view.ranks
    own = ranks.share(windows)
    parts = list(progress.track(token_losses(view, own, 2), -(-len(own) // 2)))
    n_tokens = int(ranks.total(sum(part.numel() for part in parts))[0])
    means = [part.mean(dim=1, dtype=torch.float64).cpu() for part in parts]
    per_window = ranks.gather_rows(torch.cat([torch.empty(0, dtype=torch.float64), *means]))
    ppl = math.exp(_finite(float(per_window.mean())))  # windows are of equal length
    error = ppl * estimate_mean(per_window).stderr
    return Estimate(ppl, error, n=n_tokens, losses=tuple(per_window.tolist()))
