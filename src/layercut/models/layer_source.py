"""A checkpoint run layer by layer: one layer's weights are in memory at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from layercut.checkpoints.hf_calls import guard
from layercut.checkpoints.layout import Layout
from layercut.checkpoints.safetensors_file import (
    DTYPES,
    TABLES,
    StoredTensor,
    read_stored_tensors,
    read_tensor,
)
from layercut.checkpoints.weight_names import Conversion
from layercut.errors import ModelError
from layercut.models.load import weights_dtype
from layercut.models.view import DecoderView


def open_streamed(
    folder: Path,
    layout: Layout,
    *,
    dtype: torch.dtype | None = None,
    attention: str | dict[str, str] | None = None,
) -> DecoderView:
    """A model on the CPU whose layers read their weights when they run and forget them after.

    Args:
        folder: a checkpoint that is not quantised.
        layout: where its layers are.
        dtype: of the weights in memory; default: as they are stored, float32 for float16.
        attention: attention implementation; transformers' choice if ``None``.

    Raises:
        ModelError: the files lack a tensor.
    """
    stored = read_stored_tensors(folder)
    dtype = dtype or weights_dtype("auto", stored, torch.device("cpu"))
    # Parameters get no memory; rotary tables and other buffers are computed as usual.
    with (
        guard(f"{folder} cannot be loaded", ModelError, "See that its files belong together."),
        init_empty_weights(include_buffers=False),
    ):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    tied: Mapping[str, str] = model.all_tied_weights_keys
    view = DecoderView(
        model,
        None,
        name=str(folder),
        path=folder,
        layout=layout,
        fingerprint="",
        mixed_precision=False,
    )
    pieces: dict[int | None, dict[str, StoredTensor]] = defaultdict(dict)
    conversion = Conversion(model)
    for name, tensor in stored.items():
        number = layout.stored_number(name)
        if number is not None and number < layout.n_layers:
            pieces[number][name] = tensor
        elif number is None and conversion.reads(name):  # other parts need no memory
            pieces[None][name] = tensor
    missing = _read(model, pieces[None], dtype)
    absent = {n for n in missing - tied.keys() if not n.startswith(f"{layout.layers}.")}
    if absent:
        raise ModelError(
            f"{folder} holds nothing for {min(absent)}, so its layers cannot be run one at a "
            "time. Load the whole model instead."
        )
    if missing & tied.keys():
        model.tie_weights()
    for index, layer in enumerate(view.layers):
        _stream(view, index, layer, pieces[index], dtype)
    return view


@torch.no_grad()
def compute_logits(view: DecoderView, ids: Tensor) -> Tensor:
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
    empty = {name: tensor.detach() for name, tensor in layer.state_dict().items()}
    own = {f"{view.layout.layers}.{index}.{name}" for name in empty}

    def read(*_: Any) -> None:
        if index not in view.skipped and (absent := own & _read(view.model, stored, dtype)):
            raise ModelError(
                f"{view.path} holds nothing for {min(absent)}. Use the whole checkpoint."
            )

    def forget(*_: Any) -> None:
        layer.load_state_dict(empty, assign=True)

    layer.register_forward_pre_hook(read)
    layer.register_forward_hook(forget)


def _read(model: Any, stored: Mapping[str, StoredTensor], dtype: torch.dtype) -> set[str]:
    """Fill a part of a model with stored tensors, put together as transformers does.

    Returns:
        Every name of the model's state dict that was not among them.

    Raises:
        ModelError: transformers cannot put a tensor together, or it has another shape.
    """
    config = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),
    )
    tensors = {name: read_tensor(tensor) for name, tensor in stored.items() if _can_decode(tensor)}
    with guard(
        f"{model.name_or_path} cannot be loaded", ModelError, "Load the whole model instead."
    ):
        info, _ = convert_and_load_state_dict_in_model(model, tensors, config)
    model.requires_grad_(False)
    failed = {name: f"shape {list(shape)}" for name, shape, _ in info.mismatched_keys}
    failed |= info.conversion_errors
    if failed:
        name = min(failed)
        raise ModelError(
            f"transformers cannot fill {name} from the stored weights ("
            f"{' '.join(failed[name].split())}). Use the configuration that belongs to them."
        )
    missing: set[str] = info.missing_keys
    return missing


def _can_decode(tensor: StoredTensor) -> bool:
    """Whether a tensor can be decoded; masks of old checkpoints are in other types."""
    return tensor.dtype in DTYPES | TABLES
