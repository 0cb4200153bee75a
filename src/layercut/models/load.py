"""A model's name or folder → a :class:`DecoderView`, or a refusal that says why."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from layercut.checkpoints.folder import list_weight_files
from layercut.checkpoints.hf_calls import guard, muted
from layercut.checkpoints.own_code import warn_of_own_code
from layercut.checkpoints.preflight import check_folder, list_tokenizer_files, load_strictly
from layercut.checkpoints.resolve import find_folder
from layercut.checkpoints.safetensors_file import DTYPES, StoredTensor
from layercut.errors import ModelError, RecipeError, suggestion
from layercut.launcher import count_neighbours
from layercut.machine import available_memory_bytes
from layercut.models.attention import read_attention
from layercut.models.dtypes import has_bfloat16, weights_dtype
from layercut.models.load_streamed import open_streamed
from layercut.models.stored_parts import check_finite
from layercut.models.view import DecoderView

DTYPE_NAMES = ("auto", "float32", "bfloat16")
RESIDENCIES = ("auto", "resident", "streamed")
MEMORY_SHARE = 0.8
"""Part of the free memory that weights may take before their layers are streamed."""
NO_LENGTH_LIMIT = 1 << 62
HASHED_AT_ONCE = 8
"""Shards that are hashed side by side: one takes a second per 1.5 GB and core."""


def load(
    model: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    residency: str = "auto",
) -> DecoderView:
    """Load a causal language model for pruning.

    Args:
        model: ``embedded:smollm2-135m``, a local checkpoint folder, a ``.gguf`` file, or a Hub
            name.
        revision: branch, tag or commit of a Hub model.
        dtype: ``auto`` keeps the stored one (float16 becomes float32 on a CPU) and lets matrix
            products of float32 weights run in bfloat16; ``float32`` is exact; ``bfloat16``.
        device: ``auto`` is CUDA where there is one, else the CPU.
        residency: ``resident`` keeps all weights in memory, ``streamed`` reads each layer from its
            file whenever it runs; ``auto`` streams what would not fit.

    Raises:
        RecipeError: unknown dtype, device or residency.
        ModelError: the checkpoint cannot be read or pruned.
        NetworkError: the Hub is needed and does not give the model.
        NumericsError: a weight is NaN or Inf.
    """
    if dtype not in DTYPE_NAMES:
        hint = suggestion(dtype, DTYPE_NAMES)
        raise RecipeError(f"dtype '{dtype}' is none of {', '.join(DTYPE_NAMES)}{hint}")
    if residency not in RESIDENCIES:
        hint = suggestion(residency, RESIDENCIES)
        raise RecipeError(f"residency '{residency}' is none of {', '.join(RESIDENCIES)}{hint}")
    target = find_device(device)
    folder = find_folder(model, revision)
    layout, stored = check_folder(folder)
    warn_of_own_code(folder)
    tokenizer = load_tokenizer(folder)
    fingerprint = _fingerprint(folder)
    kind = weights_dtype(dtype, stored, target)
    mixed = dtype == "auto" and kind == torch.float32 and has_bfloat16(target)
    if residency == "streamed" or (residency == "auto" and not _fits(stored, kind, target)):
        return open_streamed(
            folder,
            layout,
            dtype=kind,
            device=target,
            tokenizer=tokenizer,
            name=model,
            fingerprint=fingerprint,
            mixed_precision=mixed,
        )
    weights = load_strictly(folder, kind, target)
    check_finite(weights.named_parameters())
    return DecoderView(
        weights,
        tokenizer,
        name=model,
        path=folder,
        layout=layout,
        fingerprint=fingerprint,
        mixed_precision=mixed,
    )


def reload(view: DecoderView) -> DecoderView:
    """The checkpoint of ``view`` once more, as it is on disk, in the same dtype and place."""
    attention = read_attention(view.model.config)
    weights = load_strictly(view.path, view.model.dtype, view.device, attention)
    return DecoderView(
        weights,
        view.tokenizer,
        name=view.name,
        path=view.path,
        layout=view.layout,
        fingerprint=view.fingerprint,
        mixed_precision=view.mixed_precision,
    )


def _fits(stored: Mapping[str, StoredTensor], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the weights leave a part of the free memory to rows and sums."""
    numbers = sum(math.prod(t.shape) for t in stored.values() if t.dtype in DTYPES)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = available_memory_bytes() // count_neighbours()
    return numbers * dtype.itemsize <= MEMORY_SHARE * free


def find_device(device: str) -> torch.device:
    """Where a model computes.

    Args:
        device: of the recipe: ``auto``, ``cpu``, ``cuda``, ``cuda:0`` …

    Raises:
        RecipeError: there is none of that name.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise RecipeError(f"device '{device}' is none of auto, cpu, cuda, cuda:0 …") from error
    if target.type not in {"cpu", "cuda"}:
        raise RecipeError(f"device '{device}' is not supported. Use auto, cpu or cuda.")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise RecipeError(f"device '{device}' is not there. Use device: cpu.")
    return target


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder.

    Raises:
        ModelError: it cannot be read.
    """
    what, remedy = "cannot be read", "Copy the tokenizer files of the model again."
    with guard(f"the tokenizer in {folder} {what}", ModelError, remedy), muted():
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    # Calibration text is cut into windows after tokenising: its length is no mistake.
    tokenizer.model_max_length = NO_LENGTH_LIMIT
    return tokenizer


def _fingerprint(folder: Path) -> str:
    """sha256 over the names and contents of the files that determine the model, names sorted."""
    weights = list_weight_files(folder)
    paths = sorted({folder / "config.json", *list_tokenizer_files(folder), *weights})
    total = hashlib.sha256()
    with ThreadPoolExecutor(min(HASHED_AT_ONCE, len(weights))) as pool:
        for path, digest in zip(paths, pool.map(_hash_file, paths), strict=True):
            total.update(f"{path.relative_to(folder).as_posix()} {digest}\n".encode())
    return total.hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
