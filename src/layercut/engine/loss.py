"""Cross-entropy of a model on token windows, and divergence between next-token distributions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from layercut.engine.residual_stream import ResidualStream
from layercut.errors import DataError, NumericsError
from layercut.models.ranks import Ranks
from layercut.models.view import DecoderView
from layercut.types import CalibrationBatches, split_rows


def token_losses(view: DecoderView, windows: Tensor, micro_batch: int) -> Iterator[Tensor]:
    """Cross-entropy of every predicted token, in nats, by micro-batch, (batch, n).

    Where layers are read from their files, all windows pass one layer before the next is read.

    Args:
        view: the model.
        windows: token ids, (n, seq_len).
        micro_batch: windows in memory at once.
    """
    if view.source is None:
        yield from (view.token_losses(ids) for ids in split_rows(windows, micro_batch))
        return
    stream = ResidualStream(view, CalibrationBatches(windows, micro_batch, micro_batch, "", ""))
    for layer in range(view.n_layers):
        if layer not in view.skipped:
            stream.advance(layer)
    yield from stream.losses(windows)


def mean_loss(view: DecoderView, windows: Tensor, micro_batch: int) -> float:
    """Mean cross-entropy, in nats, of every token of every window but its first.

    Every rank computes its share of the windows, and all have the mean.

    Raises:
        NumericsError: it is not finite.
    """
    own = view.ranks.share(windows)
    return mean(token_losses(view, own, micro_batch), view.ranks)


def mean(losses: Iterable[Tensor], ranks: Ranks) -> float:
    """The mean over all ranks' micro-batches' token losses, in nats.

    Raises:
        NumericsError: it is not finite.
    """
    parts = list(losses)
    own = float(torch.cat(parts).sum(dtype=torch.float64)) if parts else 0.0
    total, n_tokens = ranks.total(own, sum(part.numel() for part in parts))
    return _finite(total / n_tokens)


def kl_divergence(
    logits: Tensor, dense: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(q ‖ p) of every row in nats, (n,), and p and q, (n, vocabulary); all float32.

    Args:
        logits: p is the softmax of these / ``temperature``, (n, vocabulary).
        dense: q is that of these.
        temperature: softens both.
    """
    z, target = logits.float() / temperature, dense.float() / temperature
    p, q = z.softmax(dim=-1), target.softmax(dim=-1)
    # Σ q log(q/p) = Σ q (target − z) − log Σ e^target + log Σ e^z
    divergence = log_normaliser(z, p) - log_normaliser(target, q)
    divergence += torch.linalg.vecdot(q, target.sub_(z))
    return divergence, p, q


def log_normaliser(z: Tensor, p: Tensor) -> Tensor:
    """Of every row, log Σ e^z, from its softmax p: on a CPU, logsumexp takes 15 times as long."""
    return z.amax(dim=-1) - p.amax(dim=-1).log()


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
    rows = view.vocabulary_size
    highest = int(input_ids.max())
    if highest >= rows:
        raise DataError(
            f"token id {highest} is outside the model's vocabulary of {rows}. "
            "Use the tokenizer that belongs to the model."
        )
