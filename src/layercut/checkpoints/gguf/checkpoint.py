"""A GGUF file as an ordinary checkpoint: dequantised, cached by its content."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerFast

from layercut.checkpoints.conversion_cache import Convert, cache_conversion
from layercut.checkpoints.folder import SINGLE_FILE
from layercut.checkpoints.gguf.conversion import ConvertedModel, plan_conversion
from layercut.checkpoints.gguf.header import GgufHeader
from layercut.checkpoints.gguf.keys import ORIGINAL
from layercut.checkpoints.gguf.model import check_token_ids, find_parts, read_language_model
from layercut.checkpoints.gguf.tokenizer import build_tokenizer
from layercut.checkpoints.gguf.vocabulary import Vocabulary, read_vocabulary
from layercut.checkpoints.hf_calls import guard
from layercut.checkpoints.shard_writer import write_shard
from layercut.errors import ModelError

VERSION = "v2"
"""Raise it whenever the conversion writes something else."""
ROLES = ("bos_token", "eos_token", "pad_token")
"""Whose ids stand in the configuration."""


def checkpoint_folder(path: Path) -> Path:
    """The float32 checkpoint that a GGUF file holds; converted once, then found in the cache.

    Raises:
        ModelError: the file is damaged, or something in it cannot be carried over.
        OutputError: the cache folder cannot be written to.
        ResourceError: the disk is full.
    """
    header = read_language_model(path)
    check_token_ids(header)
    parts = find_parts(header)
    total = hashlib.sha256()
    for part in parts:
        with part.path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return cache_conversion(
        f"gguf-{total.hexdigest()[:16]}-{VERSION}",
        f"convert {path.name}",
        functools.partial(prepare, parts),
    )


def prepare(parts: Sequence[GgufHeader]) -> Convert:
    """What converts a model, once it is known that everything in its file can be carried over.

    Args:
        parts: the headers of its files, most often one.

    Raises:
        ModelError: naming what cannot be carried over, or what is missing.
    """
    path = parts[0].path
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f'{path} needs gguf to be read. Run: pip install "layercut[gguf]"')
    values = {key: _decode(parts[0], key) for key in parts[0].fields}
    vocabulary = read_vocabulary(path, values)
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    ids = {f"{role}_id": vocabulary.ids.get(role) for role in ROLES}
    model = plan_conversion(path, values, tensors, ids)
    return functools.partial(_convert, model, vocabulary, build_tokenizer(vocabulary))


def _decode(header: GgufHeader, key: str) -> Any:
    try:
        return header.fields[key].decode()
    except UnicodeDecodeError as error:
        raise header.wrong(key, "holds a text that is not UTF-8") from error


def _convert(
    model: ConvertedModel,
    vocabulary: Vocabulary,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
) -> None:
    ids: dict[str, Any] = {f"{role}_id": vocabulary.ids.get(role) for role in ROLES}
    if len(vocabulary.ends) > 1:
        ids["eos_token_id"] = list(vocabulary.ends)
    what = f"the configuration or tokenizer of {vocabulary.path} cannot be written"
    with guard(what, ModelError, ORIGINAL):
        model.config.save_pretrained(folder)
        GenerationConfig(**ids).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    write_shard(folder / SINGLE_FILE, list(model.contents.items()), {"format": "pt"})
