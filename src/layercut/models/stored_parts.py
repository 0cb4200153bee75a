"""Parts of a model filled from stored tensors, put together as transformers does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from layercut.checkpoints.hf_calls import guard
from layercut.checkpoints.safetensors_file import DTYPES, TABLES, StoredTensor, read_tensor
from layercut.errors import ModelError, NumericsError

Stored = Mapping[str, StoredTensor]
"""Stored tensors by name on disk."""


def read_decodable(stored: Stored) -> dict[str, Tensor]:
    """The tensors that can be decoded; masks of old checkpoints are in other types.

    Raises:
        ModelError: a file became shorter since its header was read.
    """
    known = DTYPES | TABLES
    return {name: read_tensor(t) for name, t in stored.items() if t.dtype in known}


def load_part(
    model: Any, content: dict[str, Tensor], dtype: torch.dtype, device: torch.device
) -> set[str]:
    """Fill a part of a model with stored tensors, put together as transformers does.

    Args:
        model: the model.
        content: the tensors by name on disk; emptied.
        dtype: of the weights in memory.
        device: where they go.

    Returns:
        Every name of the model's state dict that was not among them.

    Raises:
        ModelError: transformers cannot put a tensor together, or it has another shape.
    """
    config = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),
        device_map=None if device.type == "cpu" else {"": device},
    )
    with guard(
        f"{model.name_or_path} cannot be loaded", ModelError, "Load the whole model instead."
    ):
        info, _ = convert_and_load_state_dict_in_model(model, content, config)
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


def check_finite(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights that are NaN or Inf.

    Args:
        named: their names and values.

    Raises:
        NumericsError: names the first one.
    """
    for name, parameter in named:
        if parameter.numel() == 0:
            continue
        # NaN and Inf both survive in the extremes, which need no temporary of the weight's size.
        low, high = parameter.detach().aminmax()
        if not bool(low.isfinite() & high.isfinite()):
            raise NumericsError(
                f"{name} holds NaN or Inf. Compare its file with the sha256 of the original, or "
                "use another checkpoint."
            )
