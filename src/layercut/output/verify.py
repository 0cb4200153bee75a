"""Proof that a written checkpoint is the pruned model, before anyone can see it.

What fits into memory is reloaded and run. What does not, and what cannot be run, is compared as
files: every key, shape and byte; and where layers can be run one at a time, their logits.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from layercut.checkpoints.hf_calls import INVALID, quiet
from layercut.checkpoints.layout import Layout
from layercut.checkpoints.patch import encode_patch
from layercut.checkpoints.preflight import (
    check_tensors,
    load_strictly,
    read_layout,
    read_stored_tensors,
)
from layercut.checkpoints.safetensors_file import Content, StoredTensor, keep_slices, read_chunks
from layercut.checkpoints.shard_writer import view_bytes
from layercut.errors import ModelError, VerificationError
from layercut.machine import available_memory_bytes
from layercut.models.attention import read_attention
from layercut.models.check_method import draw_probe_ids
from layercut.models.layer_source import compute_logits, open_streamed
from layercut.models.load import reload
from layercut.models.surgery import rounding_of_rescaled
from layercut.models.view import DecoderView
from layercut.types import PruningPlan, WeightPatch

CHECK_SHAPE, PREFILL = (4, 32), 24
STREAMED_SHAPE = (1, 26)
"""Every step reads the whole model from disk once more."""
PROMPT, N_GENERATED = 8, 3
CACHED_TOLERANCE = 1e-4
"""Chunked linear attention (Qwen3-Next) and its single steps differ by 3e-5 in float32."""
REMEDY = "Nothing was saved; please report this."


def verify_checkpoint(
    folder: Path, view: DecoderView, plan: PruningPlan, patch: WeightPatch
) -> None:
    """Compare a written checkpoint with the model in memory that it was made from.

    It is reloaded where memory holds a second model, else compared by `verify_files` and run one
    layer at a time.

    Args:
        folder: the written checkpoint.
        view: the pruned model, after ``apply``.
        plan: the layers that went.
        patch: the tensors that changed, as they are stored.

    Raises:
        VerificationError: keys, bytes, logits, or logits computed step by step with a cache differ.
    """
    # On a GPU a second model always fits or fails at once; layer by layer, sums would differ.
    fits = view.device.type != "cpu" or _fits(view)
    attention = read_attention(view.model.config)
    try:
        if fits:
            written = load_strictly(folder, view.model.dtype, view.device, attention).eval()
        else:
            verify_files(view.path, folder, view.layout, plan, patch)
            layout = read_layout(folder)
            check_tensors(folder, layout)
            written = open_streamed(
                folder, layout, dtype=view.model.dtype, attention=attention
            ).model
    except ModelError as error:
        raise VerificationError(f"the written checkpoint does not reload: {error}") from error
    ids = draw_probe_ids(view, *CHECK_SHAPE).to(view.device)
    with torch.no_grad():
        expected = view.model(ids, use_cache=False).logits
        logits = written(ids, use_cache=False).logits
    _compare_logits(logits, expected, "the model's in memory")
    if fits:
        try:
            check_decoding(written, ids, PREFILL)
        except VerificationError:
            # Of some families, transformers' cached decoding is off whatever is dropped.
            if measure_cache_gap(reload(view).model.float(), ids, PREFILL) <= CACHED_TOLERANCE:
                raise
    else:
        del written
        _check_streamed_decoding(folder, ids)


def _check_streamed_decoding(folder: Path, ids: Tensor) -> None:
    """`check_decoding` with one layer in memory at a time, on a few tokens."""
    view = open_streamed(folder, read_layout(folder), dtype=torch.float32)
    n_rows, length = STREAMED_SHAPE
    check_decoding(view.model, ids[:n_rows, :length], PREFILL)


def _fits(view: DecoderView) -> bool:
    """Whether memory holds the model's weights in float32 once more."""
    return 4 * view.n_parameters <= available_memory_bytes()


def verify_files(
    source: Path, folder: Path, layout: Layout, plan: PruningPlan, patch: WeightPatch
) -> int:
    """Compare keys, types, shapes and the sha256 of every tensor, one block at a time.

    Args:
        source: the input model's folder.
        folder: the written checkpoint.
        layout: where the source's layers are.
        plan: the layers that went.
        patch: the tensors that changed, as they are stored.

    Returns:
        How many tensors were compared.

    Raises:
        VerificationError: a tensor is missing, surplus or different.
    """
    changed = encode_patch(source, layout, plan, patch)
    expected: dict[str, Content] = {
        name: changed[old] if old in changed else keep_slices(layout, plan, old, tensor)
        for old, tensor in read_stored_tensors(source).items()
        if (name := layout.new_stored_name(old, plan.new_index)) is not None
    }
    written = read_stored_tensors(folder)
    if differing := sorted(expected.keys() ^ written.keys()):
        state = "lacks" if differing[0] in expected else "holds"
        raise VerificationError(f"the written checkpoint {state} {differing[0]}. {REMEDY}")
    for name, tensor in expected.items():
        same_type = isinstance(tensor, Tensor) or tensor.dtype == written[name].dtype
        if not same_type or tuple(tensor.shape) != written[name].shape:
            raise VerificationError(f"{name} was written in another type or shape. {REMEDY}")
        if sha256(tensor) != sha256(written[name]):
            raise VerificationError(f"the sha256 of {name} changed while it was written. {REMEDY}")
    return len(expected)


def verify_streamed(source: Path, folder: Path, layout: Layout, plan: PruningPlan) -> None:
    """Compare the written model with the source whose dropped layers pass their input through.

    The written one then decodes step by step: from memory if it fits there, else layer by layer.

    Raises:
        ModelError: the layers cannot be run one at a time.
        VerificationError: the logits differ, or it does not decode as it should.
    """
    dense = open_streamed(source, layout)
    ids = draw_probe_ids(dense, *CHECK_SHAPE)
    with dense.skipping(plan.dropped):
        expected = compute_logits(dense, ids)
    fits = _fits(dense)
    del dense
    view = open_streamed(folder, read_layout(folder))
    written = compute_logits(view, ids)
    # Queries that took a factor for their layer's new number are rounded once more.
    rounding = rounding_of_rescaled(expected) if layout.index_scaled else 0.0
    _compare_logits(written, expected, "the source's", rounding)
    del view
    if fits:
        check_decoding(load_strictly(folder, torch.float32, ids.device).eval(), ids, PREFILL)
    else:
        _check_streamed_decoding(folder, ids)


def sha256(tensor: Content) -> str:
    """Hash of a tensor's stored bytes."""
    if isinstance(tensor, Tensor):
        return hashlib.sha256(view_bytes(tensor)).hexdigest()
    total = hashlib.sha256()
    if isinstance(tensor, StoredTensor):
        pieces = read_chunks(tensor.path, tensor.begin, tensor.nbytes)
    else:
        pieces = tensor.pieces()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()


def _compare_logits(logits: Tensor, expected: Tensor, whose: str, rounding: float = 0.0) -> None:
    gap = float((logits - expected).abs().max())
    if not gap <= rounding * float(expected.abs().max()):
        raise VerificationError(
            f"the written checkpoint's logits differ from {whose} by {gap:.2g}. {REMEDY}"
        )


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
    bound = CACHED_TOLERANCE * max(1.0, float(model(ids, use_cache=False).logits.abs().max()))
    try:
        gap = measure_cache_gap(model, ids, prefill) / CACHED_TOLERANCE * bound
        if gap <= bound:
            gap = _generation_gap(model, ids[:1, :PROMPT])
            what = " generates tokens that are not its likeliest: their logits are lower"
        else:
            what = "'s cached logits differ from its uncached ones"
    except (*INVALID, IndexError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise VerificationError(
            f"the written checkpoint cannot decode step by step: {reason}. {REMEDY}"
        ) from error
    if not gap <= bound:
        raise VerificationError(f"the written checkpoint{what} by {gap:.2g}. {REMEDY}")


def _generation_gap(model: Any, prompt: Tensor) -> float:
    """By how much the logits of greedily generated tokens lie below the highest ones."""
    settings = GenerationConfig(
        max_new_tokens=N_GENERATED, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    before, model.generation_config = model.generation_config, settings
    try:
        with quiet():
            tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt))
    finally:
        model.generation_config = before
    new = tokens[:, prompt.shape[1] :]
    logits = model(tokens[:, :-1], use_cache=False).logits[:, prompt.shape[1] - 1 :]
    chosen = logits.gather(-1, new[..., None])[..., 0]
    return float((logits.max(dim=-1).values - chosen).max())


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
