"""A checkpoint opened so that its layers are read whenever they run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from layercut.checkpoints.hf_calls import guard
from layercut.checkpoints.layout import Layout
from layercut.checkpoints.safetensors_file import StoredTensor, read_stored_tensors
from layercut.checkpoints.weight_names import Conversion
from layercut.errors import ModelError
from layercut.models.dtypes import weights_dtype
from layercut.models.layer_source import LayerSource
from layercut.models.stored_parts import check_finite, load_part, read_decodable
from layercut.models.view import DecoderView


def open_streamed(
    folder: Path,
    layout: Layout,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    attention: str | dict[str, str] | None = None,
    tokenizer: Any = None,
    name: str = "",
    fingerprint: str = "",
    mixed_precision: bool = False,
) -> DecoderView:
    """A model whose layers read their weights when they run and forget them after.

    Args:
        folder: a checkpoint that is not quantised.
        layout: where its layers are.
        dtype: of the weights in memory; default: as they are stored, float32 for float16.
        device: where the weights go; default: the CPU.
        attention: attention implementation; transformers' choice if ``None``.
        tokenizer: the model's, where texts are read.
        name: what the user called it; default: the folder.
        fingerprint: hash of the checkpoint's files, where it is needed.
        mixed_precision: run float32 weights through bfloat16 matrix products.

    Raises:
        ModelError: the files lack a tensor.
        NumericsError: a weight outside the layers is NaN or Inf.
    """
    device = device or torch.device("cpu")
    stored = read_stored_tensors(folder)
    dtype = dtype or weights_dtype("auto", stored, device)
    # Parameters get no memory; rotary tables and other buffers are computed as usual.
    with (
        guard(f"{folder} cannot be loaded", ModelError, "See that its files belong together."),
        init_empty_weights(include_buffers=False),
    ):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    view = DecoderView(
        model,
        tokenizer,
        name=name or str(folder),
        path=folder,
        layout=layout,
        fingerprint=fingerprint,
        mixed_precision=mixed_precision,
    )
    pieces: dict[int | None, dict[str, StoredTensor]] = defaultdict(dict)
    conversion = Conversion(model)
    for tensor_name, tensor in stored.items():
        number = layout.stored_number(tensor_name)
        if number is not None and number < layout.n_layers:
            pieces[number][tensor_name] = tensor
        elif number is None and conversion.reads(tensor_name):  # other parts need no memory
            pieces[None][tensor_name] = tensor
    _load_rest(view, pieces[None], dtype, device)
    view.source = LayerSource(
        model,
        layout,
        [pieces[index] for index in range(layout.n_layers)],
        dtype=dtype,
        device=device,
        skipped=lambda: view.skipped,
    )
    return view


def _load_rest(
    view: DecoderView, stored: Mapping[str, StoredTensor], dtype: torch.dtype, device: torch.device
) -> None:
    """Fill all that is no layer: embedding, norms, head."""
    model = view.model
    tied: Mapping[str, str] = model.all_tied_weights_keys
    missing = load_part(model, read_decodable(stored), dtype, device)
    absent = {n for n in missing - tied.keys() if not n.startswith(f"{view.layout.layers}.")}
    if absent:
        raise ModelError(
            f"{view.path} holds nothing for {min(absent)}, so its layers cannot be run one at a "
            "time. Load the whole model instead."
        )
    if missing & tied.keys():
        model.tie_weights()
    model.requires_grad_(False)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    check_finite((n, p) for n, p in model.named_parameters() if not p.is_meta)


@torch.no_grad()
def compute_logits(view: DecoderView, ids: Tensor) -> Tensor:
    """Logits without a cache, (batch, seq, vocabulary)."""
    logits: Tensor = view.model(ids.to(view.device), use_cache=False).logits
    return logits
