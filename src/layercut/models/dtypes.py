"""Which type of number weights have in memory, and which arithmetic is fast where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from layercut.checkpoints.safetensors_file import DTYPES, StoredTensor


def weights_dtype(
    dtype: str, stored: Mapping[str, StoredTensor], device: torch.device
) -> torch.dtype:
    """The type that weights have in memory.

    Args:
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        stored: the checkpoint's tensors.
        device: where they go.
    """
    if dtype != "auto":
        return torch.float32 if dtype == "float32" else torch.bfloat16
    sizes: Counter[str] = Counter()
    for tensor in stored.values():
        if tensor.dtype in DTYPES:
            sizes[tensor.dtype] += tensor.nbytes
    most = DTYPES[sizes.most_common(1)[0][0]]
    # CPUs have no fast float16, and squares of float16 gradients overflow at 256.
    return torch.float32 if most == torch.float16 and device.type == "cpu" else most


def has_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are fast on this device."""
    if device.type == "cuda":
        return True
    return any(on for name, on in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
