"""Training windows that scoring, selection and recovery have not seen; some are held out."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from layercut.data.calibration import cut_windows, read_tokens, texts_of
from layercut.engine.loss import check_vocabulary
from layercut.errors import DataError, RecipeError
from layercut.models.special_tokens import TextFrame, text_frame
from layercut.models.view import DecoderView
from layercut.recipe.heal import HealConfig
from layercut.recipe.recipe import CalibrationConfig
from layercut.types import CalibrationBatches


def heal_windows(
    config: HealConfig,
    calibration: CalibrationConfig,
    batches: CalibrationBatches,
    tokenizer: Any,
    *,
    seed: int = 0,
) -> Tensor:
    """Token ids of a heal, (n, seq_len), shuffled.

    Of the calibration's own text only windows that share no token with it are taken, if these are
    at least half of all; otherwise all are, with a warning.

    Args:
        config: the recipe's section ``heal``.
        calibration: the recipe's section ``calibration``, whose text is the default.
        batches: what was drawn for it.
        tokenizer: the model's.
        seed: of the order.

    Raises:
        DataError: the text cannot be read or is shorter than one window.
        NetworkError: the text is on the Hub, which cannot be reached.
    """
    data = config.data or calibration.data
    sources = [data] if isinstance(data, str) else list(data)
    n_windows = config.max_tokens // config.seq_len
    if config.steps is not None:
        n_windows = min(n_windows, config.held_out + config.steps * config.batch_size)
    column = config.text_column or calibration.text_column
    drawn = [
        _windows(source, column, tokenizer, config.seq_len, -(-n_windows // len(sources)), batches)
        for source in sources
    ]
    windows = torch.cat(drawn)
    generator = torch.Generator().manual_seed(seed)
    return windows[torch.randperm(len(windows), generator=generator)]


def _windows(
    source: str,
    column: str,
    tokenizer: Any,
    seq_len: int,
    n_wanted: int,
    batches: CalibrationBatches,
) -> Tensor:
    """The first ``n_wanted`` windows of a text that hold nothing of the calibration."""
    frame = text_frame(tokenizer)
    n_leading = len(frame.leading)
    n_text, used = seq_len - n_leading, _without_leading(batches.input_ids, frame)
    # Each calibration window excludes what lies in it and, at its edges, parts of two windows.
    n_excluded = len(used) * (used.shape[1] + 2 * n_text)
    texts = texts_of(source, column, tokenizer)
    ids = read_tokens(texts, tokenizer, frame, n_wanted * n_text + n_excluded)
    if len(ids) < n_text:
        raise DataError(
            f"{source} holds {len(ids)} tokens, fewer than one window of heal.seq_len "
            f"{seq_len}. Use more text, or lower heal.seq_len."
        )
    windows = cut_windows(ids, frame, seq_len)
    is_unseen = ~_cut(overlap_mask(torch.tensor(ids), used), n_text).any(dim=1)
    unseen = windows[is_unseen]
    if 2 * len(unseen) < min(len(windows), n_wanted):
        warnings.warn(
            f"{source} holds only {len(unseen)} window(s) of {seq_len} tokens that the calibration "
            f"has not used; the heal takes all {len(windows[:n_wanted])}.",
            stacklevel=3,
        )
        unseen = windows
    return unseen[:n_wanted]


def _without_leading(windows: Tensor, frame: TextFrame) -> Tensor:
    """The windows' text alone: what their source holds, wherever it is looked for."""
    n = len(frame.leading)
    starts = windows[:, :n].tolist()
    return windows[:, n:] if n and all(tuple(s) == frame.leading for s in starts) else windows


def overlap_mask(stream: Tensor, used: Tensor) -> Tensor:
    """Which tokens of a text are in calibration windows, which were cut from its start as well.

    Args:
        stream: the text's tokens, (n,), without leading ones.
        used: the text of the windows, (n_windows, length), without leading tokens.
    """
    seen = torch.zeros(len(stream), dtype=torch.bool)
    if len(stream) < used.shape[1]:
        return seen
    drawn = {row.numpy().tobytes() for row in used}
    rows = [row.numpy().tobytes() in drawn for row in _cut(stream, used.shape[1])]
    seen[: len(rows) * used.shape[1]] = torch.tensor(rows).repeat_interleave(used.shape[1])
    return seen


def _cut(stream: Tensor, length: int) -> Tensor:
    n = len(stream) // length
    return stream[: n * length].view(n, length)


def hold_out(windows: Tensor, n_held_out: int) -> tuple[Tensor, Tensor]:
    """Windows that train, and those, evenly among them, that only measure."""
    positions = torch.arange(n_held_out) * len(windows) // n_held_out
    held_out = torch.zeros(len(windows), dtype=torch.bool)
    held_out[positions] = True
    return windows[~held_out], windows[held_out]


def check_windows(view: DecoderView, windows: Tensor, config: HealConfig) -> None:
    """Refuse windows that cannot be trained on, before the long work.

    Raises:
        DataError: too few of them, or token ids that the model has not.
        RecipeError: they are longer than the model's context.
    """
    n_windows, seq_len = windows.shape
    if seq_len > view.context:
        raise RecipeError(
            f"heal.seq_len is {seq_len}, but the model's context is {view.context} tokens. "
            "Lower it."
        )
    if n_windows < config.held_out + config.batch_size:
        raise DataError(
            f"the text yields {n_windows} window(s) of {seq_len} tokens, but heal.held_out "
            f"{config.held_out} and one step's heal.batch_size {config.batch_size} need "
            f"{config.held_out + config.batch_size}. Use more text, or lower one of them."
        )
    check_vocabulary(view, windows)
