"""Perplexity over non-overlapping windows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layercut import progress
from layercut.errors import DataError, NumericsError
from layercut.results import Figure

if TYPE_CHECKING:
    from layercut.models.view import DecoderView


def perplexity(view: DecoderView, windows: Tensor) -> Figure:
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
    rows = [
        view.token_losses(ids) for ids in progress.track(windows.split(2), -(-len(windows) // 2))
    ]
    losses = torch.cat(rows).double().cpu()
    mean = _finite(float(losses.mean()))
    per_window = losses.mean(dim=1)
    spread = float(per_window.std()) / len(per_window) ** 0.5 if len(per_window) > 1 else 0.0
    ppl = math.exp(mean)
    return Figure(ppl, ppl * spread, n=losses.numel(), losses=tuple(per_window.tolist()))


def mean_loss(view: DecoderView, windows: Tensor, micro_batch: int) -> float:
    """Mean cross-entropy, in nats, of every token of every window but its first.

    Raises:
        NumericsError: it is not finite.
    """
    losses = [view.token_losses(ids) for ids in windows.split(micro_batch)]
    return _finite(float(torch.cat(losses).double().mean()))


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise NumericsError(
            f"the evaluation loss is {loss}: the model yields values that are not finite. "
            "Use dtype: float32, or check the weights."
        )
    return loss


def check_vocabulary(view: DecoderView, input_ids: Tensor) -> None:
    """Refuse ids without an embedding row.

    Raises:
        DataError: tokenizer and model do not belong together.
    """
    rows = int(view.model.get_input_embeddings().weight.shape[0])
    highest = int(input_ids.max())
    if highest >= rows:
        raise DataError(
            f"token id {highest} is outside the model's vocabulary of {rows}. "
            "Use the tokenizer that belongs to the model."
        )
