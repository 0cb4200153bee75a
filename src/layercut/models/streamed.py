"""A checkpoint run layer by layer: one layer's weights are in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from layercut.errors import ModelError
from layercut.models.layout import Layout
from layercut.models.load import weights_dtype
from layercut.models.preflight import stored_tensors
from layercut.models.quiet import quiet
from layercut.models.shards import StoredTensor, read_tensor
from layercut.models.view import DecoderView


def open_streamed(
    folder: Path,
    layout: Layout,
    *,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
) -> DecoderView:
    """A model on the CPU whose layers read their weights when they run and forget them after.

    Args:
        folder: a checkpoint that is not quantised.
        layout: where its layers are.
        dtype: of the weights in memory; default: as they are stored, float32 for float16.
        attention: attention implementation; transformers' choice if ``None``.

    Raises:
        ModelError: the files do not hold the layers' tensors under the model's own names.
    """
    stored = stored_tensors(folder)
    dtype = dtype or weights_dtype("auto", stored, torch.device("cpu"))
    # Parameters get no memory; rotary tables and other buffers are computed as usual.
    with quiet(), init_empty_weights(include_buffers=False):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    absent = model.state_dict().keys() - stored.keys() - model.all_tied_weights_keys.keys()
    if absent:
        raise ModelError(
            f"{folder} does not hold {min(absent)} under that name, so its layers cannot be run "
            "one at a time. Load the whole model instead."
        )
    view = DecoderView(
        model,
        None,
        name=str(folder),
        path=folder,
        layout=layout,
        fingerprint="",
        mixed_precision=False,
    )
    outside = {
        name: read_tensor(tensor).to(dtype)
        for name, tensor in stored.items()
        if name in model.state_dict() and not name.startswith(f"{layout.layers}.")
    }
    model.load_state_dict(outside, strict=False, assign=True)
    model.tie_weights()
    for index, layer in enumerate(view.layers):
        _stream(view, index, layer, stored, dtype)
    return view


@torch.no_grad()
def logits_of(view: DecoderView, ids: Tensor) -> Tensor:
    """Logits without a cache, (batch, seq, vocabulary)."""
    logits: Tensor = view.model(ids.to(view.device), use_cache=False).logits
    return logits


def _stream(
    view: DecoderView,
    index: int,
    layer: nn.Module,
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype,
) -> None:
    """Let ``layer`` hold its weights only while it runs."""
    prefix = f"{view.layout.layers}.{index}."
    empty = {name: tensor.detach() for name, tensor in layer.state_dict().items()}

    def read(*_: Any) -> None:
        if index not in view.skipped:
            weights = {name: read_tensor(stored[prefix + name]).to(dtype) for name in empty}
            layer.load_state_dict(weights, assign=True)

    def forget(*_: Any) -> None:
        layer.load_state_dict(empty, assign=True)

    layer.register_forward_pre_hook(read)
    layer.register_forward_hook(forget)
