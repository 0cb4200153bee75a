"""The tiny models and cheap options on which every registered method is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import save_tiny
from layercut.models.load import load
from layercut.models.view import DecoderView
from layercut.registry import MethodCall, Stage, resolve

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {"n_embd": 16, "n_layer": 6, "n_head": 4, "n_positions": 128}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 4}),
    "mamba": ("mamba", {}),
}
"""Plain; transposed weights; experts; a norm behind the MLP; layers that cannot run alone."""

CHEAP_RUN = {"steps": 3, "rank": 2}
CHEAP: dict[str, dict[str, Any]] = {"igia": CHEAP_RUN, "sign-merge": {**CHEAP_RUN, "strength": 0.5}}
"""Options of methods that train; every other one runs with its defaults."""


def open_family(folder: Path, family: str) -> DecoderView:
    """A tiny random model of the family, in exact float32 arithmetic."""
    model_type, settings = FAMILIES[family]
    return load(str(save_tiny(folder, model_type, **settings)), dtype="float32")


def cheap_call(stage: Stage, name: str) -> MethodCall:
    """The method with options that keep it short."""
    return resolve(stage, name, CHEAP.get(name), seed=0)
