"""Proof that a written checkpoint is the pruned model, before anyone can see it.

What fits into memory is reloaded and run. What does not, and what cannot be run, is compared as
files: every key, shape and byte; and where layers can be run one at a time, their logits.
"""

from __future__ import annotations

import gc
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layercut.checkpoints.layout import Layout
from layercut.checkpoints.patch import encode_patch
from layercut.checkpoints.preflight import check_tensors, load_strictly, read_layout
from layercut.checkpoints.safetensors_file import (
    Content,
    StoredTensor,
    keep_slices,
    read_chunks,
    read_stored_tensors,
)
from layercut.checkpoints.shard_writer import view_bytes
from layercut.errors import ModelError, VerificationError
from layercut.machine import available_memory_bytes
from layercut.models.attention import read_attention
from layercut.models.check_method import draw_probe_ids
from layercut.models.load import reload
from layercut.models.load_streamed import compute_logits, open_streamed
from layercut.models.surgery import rounding_of_rescaled
from layercut.models.view import DecoderView
from layercut.output.decoding import REMEDY, check_decoding_beside
from layercut.types import PruningPlan, WeightPatch

CHECK_SHAPE = (4, 32)
STREAMED_SHAPE = (1, 26)
"""Every step reads the whole model from disk once more."""


def verify_checkpoint(
    folder: Path, view: DecoderView, plan: PruningPlan, patch: WeightPatch
) -> None:
    """Compare a written checkpoint with the model in memory that it was made from.

    It is reloaded where memory holds a second model, else, and where the model is read from its
    files, compared by `verify_files` and run one layer at a time.

    Args:
        folder: the written checkpoint.
        view: the pruned model, after ``apply``.
        plan: the layers that went.
        patch: the tensors that changed, as they are stored.

    Raises:
        VerificationError: keys, bytes, logits, or logits computed step by step with a cache differ.
    """
    # A model that is read from files leaves the memory to others; on a GPU, a second one fits or
    # fails at once.
    fits = view.source is None and (view.device.type != "cpu" or _fits(view))
    attention = read_attention(view.model.config)
    try:
        if fits:
            written = load_strictly(folder, view.model.dtype, view.device, attention).eval()
        else:
            verify_files(view.path, folder, view.layout, plan, patch)
            layout = read_layout(folder)
            check_tensors(folder, layout)
            written = open_streamed(
                folder,
                layout,
                dtype=view.model.dtype,
                device=view.device,
                attention=attention,
            ).model
    except ModelError as error:
        raise VerificationError(f"the written checkpoint does not reload: {error}") from error
    ids = draw_probe_ids(view, *CHECK_SHAPE).to(view.device)
    with torch.no_grad():
        expected = view.model(ids, use_cache=False).logits
        logits = written(ids, use_cache=False).logits
    _compare_logits(logits, expected, "the model's in memory")
    if fits:
        check_decoding_beside(written, lambda: reload(view).model.float(), ids)
    else:
        del written
        gc.collect()  # its modules and what reads their weights know each other
        _check_decoding_streamed(folder, view.path, ids)


def _check_decoding_streamed(folder: Path, source: Path, ids: Tensor) -> bool:
    """With one layer in memory at a time, on a few tokens."""

    def open_model(place: Path) -> Any:
        return open_streamed(place, read_layout(place), dtype=torch.float32).model

    n_rows, length = STREAMED_SHAPE
    few = ids[:n_rows, :length]
    return check_decoding_beside(open_model(folder), lambda: open_model(source), few)


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


def verify_streamed(source: Path, folder: Path, layout: Layout, plan: PruningPlan) -> bool:
    """Compare the written model with the source whose dropped layers pass their input through.

    The written one then decodes step by step: from memory if it fits there, else layer by layer.

    Returns:
        Whether it decodes as it should; ``False`` where the source does not either.

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

        def load_whole(place: Path) -> Any:
            return load_strictly(place, torch.float32, ids.device).eval()

        return check_decoding_beside(load_whole(folder), lambda: load_whole(source), ids)
    return _check_decoding_streamed(folder, source, ids)


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
