"""Layer importance from the angle by which a layer turns the residual stream (UIDL).

Source   arXiv:2403.17887 §3; whole blocks of layers are chosen by selection/methods/block.py
Formula  s_l = mean_t arccos(cos(h_{l,t}, h_{l+1,t})) / π
         h_l (tokens, d): residual stream entering layer l; t: the last token of every sequence
         [paper], or all tokens
Meaning  higher = keep; between 0 and 1
Cost     one forward pass; the streams of one micro-batch at every layer
Limits   looks at angles only: a layer that rescales the stream counts for nothing
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from layercut import progress
from layercut.engine.residual_stream import ResidualStream, split_for_walk
from layercut.models.view import DecoderView
from layercut.registry import Method, MethodOptions
from layercut.types import CalibrationBatches, LayerScores

TOKENS_AT_ONCE = 256
"""Tokens whose streams are compared at once: 256 × 33 × 4,096 float64 numbers are 264 MiB."""


class Options(MethodOptions):
    """Which tokens are compared."""

    tokens: Literal["last", "all"] = Field(
        default="last", description="last: the last one of every sequence, as published; or all"
    )


METHOD = Method(strategy="block")


def score(view: DecoderView, batches: CalibrationBatches, options: Options) -> LayerScores:
    """One forward pass over ``batches``."""
    distances = angular_distances(view, batches, options)
    return LayerScores(tuple(distances.diagonal(1).tolist()))


@torch.no_grad()
def angular_distances(view: DecoderView, batches: CalibrationBatches, options: Options) -> Tensor:
    """Mean angle between the residual streams at every two layer boundaries, in units of π.

    Returns:
        (L + 1, L + 1) float64; entry (i, j) compares h_i with h_j. float64 because the arc cosine
        turns a rounding of 1e-7 near 1 into an angle of 4e-4.
    """
    kept = slice(-1, None) if options.tokens == "last" else slice(None)
    size = view.n_layers + 1
    totals = torch.zeros(size, size, dtype=torch.float64, device=view.device)
    parts = split_for_walk(view, view.ranks.share_batches(batches))
    for part in progress.track(parts, total=len(parts)):
        stream = ResidualStream(view, part)
        seq_shape = (part.n_sequences, part.seq_len, view.hidden_size)
        streams = [stream.states.rows.view(seq_shape)[:, kept].flatten(0, 1).clone()]
        for layer in range(view.n_layers):
            stream.advance(layer)
            streams.append(stream.states.rows.view(seq_shape)[:, kept].flatten(0, 1).clone())
        for rows in zip(*(stream.split(TOKENS_AT_ONCE) for stream in streams), strict=True):
            directions = functional.normalize(torch.stack(rows, dim=1).double(), dim=-1)
            cosines = (directions @ directions.mT).clamp(-1, 1)
            totals += cosines.arccos().sum(dim=0).to(totals.device)
    view.ranks.sum_(totals)
    n_tokens = batches.n_sequences * (1 if options.tokens == "last" else batches.seq_len)
    return totals.cpu() / (n_tokens * math.pi)
