"""Cross-entropy of a model on token windows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from layercut.errors import DataError, NumericsError
from layercut.models.view import DecoderView


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
