"""What written checkpoints are compared with: the dense model, read by transformers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from layercut.checkpoints.safetensors_file import DTYPES, read_shard
from layercut.types import WeightPatch

NOTHING = WeightPatch({}, "none")


def patch_for(source: Path, name: str = "model.layers.2.mlp.down_proj.weight") -> WeightPatch:
    stored = next(
        shard.tensors[name]
        for path in sorted(source.glob("*.safetensors"))
        if name in (shard := read_shard(path)).tensors
    )
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(stored.shape, generator=generator).to(DTYPES[stored.dtype])
    return WeightPatch({name: tensor}, "test")


def identity_logits(source: Path, dropped: tuple[int, ...], patch: WeightPatch, ids: Tensor) -> Any:
    """The dense model with the dropped layers as the identity."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    model.load_state_dict(dict(patch.tensors), strict=False)
    for layer in dropped:
        model.model.layers[layer].forward = lambda hidden_states, **_: hidden_states
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def read_back(folder: Path, ids: Tensor) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    with torch.no_grad():
        return model.eval()(ids, use_cache=False).logits


def all_tensors(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        state |= load_file(path)
    return state


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
