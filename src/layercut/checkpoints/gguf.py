"""A GGUF file as an ordinary checkpoint: dequantised by transformers, cached by its content."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from layercut.checkpoints.conversion_cache import Convert, cache_conversion
from layercut.checkpoints.gguf_model import check_token_ids, read_language_model
from layercut.checkpoints.gguf_tokenizer import bpe_tokenizer
from layercut.checkpoints.hf_calls import INVALID, quiet
from layercut.errors import ModelError

VERSION = "v1"
"""Raise it whenever the conversion writes something else."""
ORIGINAL = "Use the original checkpoint."
UNREADABLE = (*INVALID, IndexError, UnicodeDecodeError, NotImplementedError)


def checkpoint_folder(path: Path) -> Path:
    """The float32 checkpoint that a GGUF file holds; converted once, then found in the cache.

    Raises:
        ModelError: the file is damaged, or of an architecture or type that cannot be converted.
        OutputError: the cache folder cannot be written to.
        ResourceError: the disk is full.
    """
    check_token_ids(read_language_model(path))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return cache_conversion(
        f"gguf-{digest[:16]}-{VERSION}", f"convert {path.name}", functools.partial(_prepare, path)
    )


def _prepare(path: Path) -> Convert:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f'{path} needs gguf to be read. Run: pip install "layercut[gguf]"')
    return functools.partial(_convert, path, _tokenizer(path, _fields(path)))


def _convert(path: Path, tokenizer: Any, folder: Path) -> None:
    try:
        with quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
            )
    except UNREADABLE as error:
        raise ModelError(
            f"{path} cannot be converted: {' '.join(str(error).split())}. {ORIGINAL}"
        ) from error
    # What is written is no longer quantised, whatever transformers remembers of the file.
    model.config.architectures = [type(model).__name__]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _fields(path: Path) -> Any:
    """The file's fields, once everything in it can be converted."""
    from gguf import GGUFReader, dequantize  # an optional extra
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    try:
        reader = GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
    except UNREADABLE as error:
        raise ModelError(
            f"{path} is damaged, truncated or of a newer GGUF version "
            f"({' '.join(str(error).split())}). Download it again."
        ) from error
    parts = reader.fields.get("split.count")
    if parts is not None and parts.contents() > 1:
        raise ModelError(f"{path} is one of several parts of a model. Merge them into one file.")
    # GGUF writes qwen3moe where transformers writes qwen3_moe.
    known = {name.replace("_", "") for name in GGUF_SUPPORTED_ARCHITECTURES}
    if architecture.replace("_", "").replace("-", "") not in known:
        raise ModelError(
            f"{path}: transformers cannot convert the architecture '{architecture}' from GGUF. "
            f"{ORIGINAL}"
        )
    for kind, count in Counter(tensor.tensor_type for tensor in reader.tensors).items():
        first = next(tensor for tensor in reader.tensors if tensor.tensor_type == kind)
        try:
            dequantize(first.data[:1], kind)
        except NotImplementedError as error:
            raise ModelError(
                f"{path} stores {count} tensors as {kind.name}, which cannot be dequantised. "
                f"{ORIGINAL}"
            ) from error
    return reader.fields


def _tokenizer(path: Path, fields: Any) -> Any:
    kind = fields.get("tokenizer.ggml.model")
    if kind is None:
        raise ModelError(f"{path} holds no tokenizer. {ORIGINAL}")
    if kind.contents() == "gpt2":
        return bpe_tokenizer(fields)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True
            )
    except UNREADABLE as error:
        raise ModelError(
            f"the tokenizer in {path} cannot be converted: {' '.join(str(error).split())}. "
            f"{ORIGINAL}"
        ) from error
