"""Texts + tokenizer → packed token windows.

Every window starts as every text starts for the model: with the tokens that its tokenizer puts in
front. The first is never a target, and a window keeps its length.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from layercut.data.encoding import row_texts
from layercut.data.named_texts import refuse_test_split
from layercut.data.sources import read_texts
from layercut.errors import DataError, RecipeError
from layercut.models.special_tokens import TextFrame, leading_tokens, text_frame
from layercut.recipe.recipe import CalibrationConfig
from layercut.recipe.validation import validate
from layercut.types import CalibrationBatches

POOL = 16
"""Windows that are packed for each one that is drawn, so that a draw sees more than the start."""

MICRO_BATCH_TOKENS = 2048

ROWS = "rows:"
"""Before a source of task rows, whose prompts and right answers are to be read as text."""

CHARACTERS_PER_TOKEN = 16
"""More than tokens of running text have, about 4; see `_first_tokens`."""


def calibration_batches(
    section: CalibrationConfig | Mapping[str, Any], tokenizer: Any, *, seed: int = 0
) -> CalibrationBatches:
    """Draw calibration windows from the recipe's text, without replacement, in corpus order.

    Several texts give equally many windows each, shuffled.

    Args:
        section: ``calibration`` of a recipe, or a mapping with its keys.
        tokenizer: the model's.
        seed: of the draw.

    Raises:
        RecipeError: the mapping has unknown keys or impossible values.
        DataError: the text cannot be read or has fewer than two tokens.
        NetworkError: the text is on the Hub, which cannot be reached.
    """
    if not isinstance(section, CalibrationConfig):
        section = validate(CalibrationConfig, dict(section), "calibration")
    generator = torch.Generator().manual_seed(seed)
    sources = [section.data] if isinstance(section.data, str) else list(section.data)
    shares = [len(range(i, section.n_sequences, len(sources))) for i in range(len(sources))]
    drawn = [
        _draw(source, section, tokenizer, n_wanted, generator)
        for source, n_wanted in zip(sources, shares, strict=True)
    ]
    seq_len = min(windows.shape[1] for windows in drawn)
    input_ids = torch.cat([windows[:, :seq_len] for windows in drawn])
    if len(sources) > 1:
        # Any evenly spaced part, such as the held-out one, should see every text.
        input_ids = input_ids[torch.randperm(len(input_ids), generator=generator)]
    fitting = max(1, min(section.gradient_batch, MICRO_BATCH_TOKENS // seq_len))
    return CalibrationBatches(
        input_ids=input_ids,
        gradient_batch=section.gradient_batch,
        micro_batch=fitting if section.micro_batch == "auto" else section.micro_batch,
        source=" + ".join(sources),
        fingerprint=_fingerprint(input_ids),
        n_unscored=max(1, len(leading_tokens(tokenizer))),
    )


def _draw(
    source: str,
    section: CalibrationConfig,
    tokenizer: Any,
    n_wanted: int,
    generator: torch.Generator,
) -> Tensor:
    """``n_wanted`` windows of one text, or all it has, in corpus order."""
    texts = texts_of(source, section.text_column, tokenizer)
    windows = pack_tokens(
        texts,
        tokenizer,
        seq_len=section.seq_len,
        max_tokens=POOL * n_wanted * section.seq_len,
    )
    n_windows, seq_len = windows.shape
    if n_windows < n_wanted or seq_len < section.seq_len:
        warnings.warn(
            f"{source} holds {n_windows} calibration window(s) of {seq_len} tokens, fewer "
            f"than the {n_wanted} of {section.seq_len} asked for; all are used.",
            stacklevel=3,
        )
    drawn = torch.randperm(n_windows, generator=generator)[:n_wanted]
    return windows[drawn.sort().values]


def texts_of(source: str, text_column: str, tokenizer: Any) -> Iterator[str]:
    """The documents to learn from of a source, or of ``rows:`` and a source of task rows.

    Args:
        source: as for `read_texts`, or ``rows:`` and as for `read_rows`.
        text_column: the column of a table that holds the text.
        tokenizer: the model's, whose chat template writes chat rows.

    Raises:
        DataError: the text cannot be read, or is the test split of a benchmark.
        NetworkError: the text is on the Hub, which cannot be reached.
    """
    if source.startswith(ROWS):
        return row_texts(source.removeprefix(ROWS), tokenizer)
    refuse_test_split(source)
    return read_texts(source, text_column=text_column)


def evaluation_windows(
    source: str,
    tokenizer: Any,
    *,
    seq_len: int,
    max_tokens: int,
    detokenize: bool | Literal["auto"],
) -> Tensor:
    """The first windows of a text, in order.

    Args:
        source: as for `read_texts`.
        tokenizer: the model's.
        seq_len: tokens per window, the leading ones included.
        max_tokens: tokens that are used at most, but at least one window.
        detokenize: as for `read_texts`.

    Returns:
        Token ids, (n, seq_len), or one shorter window if the text is shorter.

    Raises:
        DataError: the text cannot be read or has fewer than two tokens.
        NetworkError: the text is on the Hub, which cannot be reached.
    """
    texts = read_texts(source, detokenize=detokenize)
    n_windows = max(1, max_tokens // seq_len)
    return pack_tokens(texts, tokenizer, seq_len=seq_len, max_tokens=n_windows * seq_len)


def pack_tokens(texts: Iterable[str], tokenizer: Any, *, seq_len: int, max_tokens: int) -> Tensor:
    """Join documents and cut windows without padding, each behind the tokenizer's leading tokens.

    Args:
        texts: documents; read until there are ``max_tokens`` tokens.
        tokenizer: the model's; see `layercut.models.special_tokens`.
        seq_len: tokens per window, the leading ones included; the rest that fills none is dropped.
        max_tokens: tokens that are used at most, the leading ones included.

    Returns:
        Token ids, (n, seq_len), int64. One window (1, n_tokens) if there are fewer than seq_len.

    Raises:
        DataError: there are fewer than two tokens, so none to predict.
        RecipeError: a window has no room for text.
    """
    frame = text_frame(tokenizer)
    n_leading = len(frame.leading)
    n_whole, rest = divmod(max_tokens, seq_len)
    n_text = n_whole * (seq_len - n_leading) + max(0, rest - n_leading)
    return cut_windows(read_tokens(texts, tokenizer, frame, n_text), frame, seq_len)


def read_tokens(
    texts: Iterable[str], tokenizer: Any, frame: TextFrame, max_tokens: int
) -> list[int]:
    """The first tokens of the documents, one stream without leading tokens.

    Between two documents stands the separator alone, where the model's training had one. A leading
    token behind it, as in some models' training, would be a target that no engine ever predicts.

    Args:
        texts: documents; read until there are ``max_tokens`` tokens.
        tokenizer: the model's.
        frame: what stands around its text.
        max_tokens: tokens at most.
    """
    ids: list[int] = []
    for text in texts:
        if ids and frame.separator is not None and ids[-1] != frame.separator:
            ids.append(frame.separator)
        # Some spare: a template may have written the leading tokens, which are not part of it.
        n_wanted = max_tokens - len(ids) + len(frame.leading)
        ids += frame.strip(_first_tokens(text, tokenizer, n_wanted))
        if len(ids) >= max_tokens:
            break
    return ids[:max_tokens]


def cut_windows(ids: list[int], frame: TextFrame, seq_len: int) -> Tensor:
    """Windows of a stream of tokens, each behind the leading tokens.

    Args:
        ids: the stream, without leading tokens.
        frame: what stands around the model's text.
        seq_len: tokens per window, the leading ones included.

    Returns:
        Token ids, (n, seq_len), int64, or one shorter window.

    Raises:
        DataError: there are fewer than two tokens, so none to predict.
        RecipeError: a window has no room for text.
    """
    n_leading = len(frame.leading)
    if seq_len <= n_leading:
        raise RecipeError(
            f"windows of {seq_len} token(s) have no room for text behind {frame.leading_token}, "
            "which the tokenizer puts in front of every text. Use longer windows."
        )
    if len(ids) < (needed := max(1, 2 - n_leading)):
        raise DataError(
            f"the text yields {len(ids)} token(s); at least {needed} are needed to predict one. "
            "Use a longer text."
        )
    n_text = min(seq_len - n_leading, len(ids))
    n_windows = len(ids) // n_text
    text = torch.tensor(ids[: n_windows * n_text], dtype=torch.int64).view(n_windows, n_text)
    leading = torch.tensor(frame.leading, dtype=torch.int64).expand(n_windows, n_leading)
    return torch.cat([leading, text], dim=1)


def _first_tokens(text: str, tokenizer: Any, n_tokens: int) -> list[int]:
    """At least the first ``n_tokens`` of a document, or all it has."""
    # A document may be a file of gigabytes: tokenise a start that is longer than needed, so that
    # its cut end does not matter, and the whole only if that was too short.
    for piece in (text[: CHARACTERS_PER_TOKEN * n_tokens], text):
        # verbose=False: a document longer than the model's context is cut into windows anyway.
        ids: list[int] = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) > n_tokens + 8 or len(piece) == len(text):
            break
    return ids


def _fingerprint(input_ids: Tensor) -> str:
    digest = hashlib.sha256(str(tuple(input_ids.shape)).encode())
    digest.update(input_ids.numpy().tobytes())
    return digest.hexdigest()
