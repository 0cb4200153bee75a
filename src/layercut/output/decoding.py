"""Whether a model decodes step by step as it reads a text whole, and generates what it predicts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from layercut.checkpoints.hf_calls import guard
from layercut.errors import VerificationError

PREFILL = 24
PROMPT, N_GENERATED = 8, 3
CACHED_TOLERANCE = 1e-4
"""Chunked linear attention (Qwen3-Next) and its single steps differ by 3e-5 in float32."""
REMEDY = "Nothing was saved; please report this."


def check_decoding_beside(written: Any, load_dense: Callable[[], Any], ids: Tensor) -> bool:
    """`check_decoding`, but for families whose cached decoding is off whatever is dropped.

    Returns:
        Whether it decodes as it should; ``False`` where the dense model does not either.
    """
    try:
        check_decoding(written, ids, PREFILL)
    except VerificationError:
        if _decodes(load_dense(), ids):
            raise
        return False
    return True


def _decodes(dense: Any, ids: Tensor) -> bool:
    """Whether cached logits are right; without any layer that counts tokens, there are none."""
    try:
        with guard("the dense model cannot decode step by step", VerificationError, REMEDY):
            return measure_cache_gap(dense, ids, PREFILL) <= CACHED_TOLERANCE
    except VerificationError:
        return False


@torch.no_grad()
def measure_cache_gap(model: Any, ids: Tensor, prefill: int) -> float:
    """How far cached logits are from uncached ones, over the largest of these or 1.

    Args:
        model: a causal language model in float32.
        ids: (batch, seq).
        prefill: tokens that are processed at once.
    """
    whole = model(ids, use_cache=False).logits
    limit = max(1.0, float(whole.abs().max()))
    gap = math.inf
    for with_positions in (False, True):
        # Bamba counts positions by its first layer's cache, unless they are given.
        if gap > CACHED_TOLERANCE:
            logits = cached_logits(model, ids, prefill, with_positions=with_positions)
            found = float((logits - whole).abs().max()) / limit
            gap = min(gap, math.inf if math.isnan(found) else found)
    return gap


@torch.no_grad()
def check_decoding(model: Any, ids: Tensor, prefill: int) -> None:
    """Compare logits with a cache and without, and let the model generate a few tokens.

    Args:
        model: a written checkpoint's model; its weights become float32.
        ids: (batch, seq).
        prefill: tokens that are processed at once.

    Raises:
        VerificationError: they differ, or a step fails.
    """
    # Float32: in a narrower dtype, rounding alone would exceed the tolerance.
    if model.dtype != torch.float32:
        model = model.float()
    with guard("the written checkpoint cannot decode step by step", VerificationError, REMEDY):
        gap = measure_cache_gap(model, ids, prefill)
        what = "'s cached logits differ from its uncached ones"
        if gap <= CACHED_TOLERANCE:
            gap = _generation_gap(model, ids[:1, :PROMPT])
            what = " generates tokens that are not its likeliest: their logits are lower"
    if not gap <= CACHED_TOLERANCE:
        raise VerificationError(
            f"the written checkpoint{what} by {gap:.2g} of the largest. {REMEDY}"
        )


def _generation_gap(model: Any, prompt: Tensor) -> float:
    """By how much the logits of greedily generated tokens lie below the highest ones.

    Over the largest of all logits or 1.
    """
    settings = GenerationConfig(
        max_new_tokens=N_GENERATED, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    before, model.generation_config = model.generation_config, settings
    try:
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt))
    finally:
        model.generation_config = before
    new = tokens[:, prompt.shape[1] :]
    logits = model(tokens[:, :-1], use_cache=False).logits[:, prompt.shape[1] - 1 :]
    chosen = logits.gather(-1, new[..., None])[..., 0]
    gap = (logits.max(dim=-1).values - chosen).max()
    return float(gap) / max(1.0, float(logits.abs().max()))


@torch.no_grad()
def cached_logits(model: Any, ids: Tensor, prefill: int, *, with_positions: bool = False) -> Tensor:
    """Logits of a prefill and single steps after it, (batch, seq, vocabulary).

    Args:
        model: a causal language model.
        ids: (batch, seq).
        prefill: tokens that are processed at once.
        with_positions: whether the tokens' places are given where they are taken, as text
            generation does.
    """
    takes = "position_ids" in inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {}
    output = model(ids[:, :prefill], use_cache=True)
    if not _caches(output):
        # RecurrentGemma fills a cache that it does not return.
        inputs = {
            "past_key_values": DynamicCache(config=model.config.get_text_config(decoder=True))
        }
        output = model(ids[:, :prefill], use_cache=True, **inputs)
    logits = [output.logits]
    for position in range(prefill, ids.shape[1]):
        places = torch.full_like(ids[:, :1], position)
        given = {"position_ids": places} if inputs or (takes and with_positions) else {}
        step = ids[:, position : position + 1]
        output = model(step, use_cache=True, **(_caches(output) or inputs), **given)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def _caches(output: Any) -> dict[str, Any]:
    """What a step hands to the next one; recurrent models name it otherwise."""
    return {k: output[k] for k in ("past_key_values", "cache_params") if k in output}
