"""A tiny checkpoint of every family, and what its logits must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import byte_tokenizer
from family_configs import N_TOKENS, VOCABULARY, Family
from layercut.types import WeightPatch

NOISE = 0.05


NOTHING = WeightPatch({}, "none")


def save_family(folder: Path, family: Family) -> Path:
    config = AutoConfig.for_model(family.model_type, **family.settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(NOISE * torch.randn_like(parameter))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def strictly(folder: Path) -> Any:
    """As any user of transformers loads it, with every key accounted for."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    return model.eval()


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (2, N_TOKENS), generator=generator)


def pass_over(layer: Any) -> None:
    forward = layer.forward

    def passed_over(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = forward(hidden_states, *args, **kwargs)
        return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states

    layer.forward = passed_over


@torch.no_grad()
def identity_logits(folder: Path, layers: str, dropped: tuple[int, ...]) -> Tensor:
    """Logits of the dense model whose dropped layers return what they are given."""
    model = strictly(folder)
    for index in dropped:
        pass_over(model.get_submodule(layers)[index])
    return model(tokens(), use_cache=False).logits
