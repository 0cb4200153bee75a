"""The LoRA-wrapped weights of a PEFT model, under the names that they have in the base model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from layercut.errors import ModelError


@dataclass(frozen=True, slots=True)
class LoraWeight:
    """One linear weight with its trainable adapter.

    Attributes:
        name: the weight's name in the base model's state dict.
        layer: the layer it belongs to; ``None`` outside of all layers.
        a: the adapter's A, (rank, in).
        b: the adapter's B, (out, rank).
        scaling: s, the factor of B·A: alpha/rank, or alpha/√rank for rsLoRA.
    """

    name: str
    layer: int | None
    a: nn.Parameter
    b: nn.Parameter
    scaling: float


def lora_weights(model: nn.Module) -> list[LoraWeight]:
    """Every linear weight of ``model`` with a trainable LoRA adapter, in the model's order.

    Raises:
        ModelError: there is none, or a weight has several.
    """
    from peft.tuners.lora import LoraLayer

    weights = []
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        adapters = [name for name in module.active_adapters if _is_trained(module, name)]
        if len(adapters) > 1:
            raise ModelError(
                f"{base_name(path)} has {len(adapters)} trainable LoRA adapters: "
                f"{', '.join(adapters)}. Train one at a time."
            )
        for adapter in adapters:
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            name = base_name(path)
            weights.append(LoraWeight(name, layer_of(name), a, b, float(module.scaling[adapter])))
    if not weights:
        raise ModelError(
            f"{type(model).__name__} has no trainable LoRA weights: no linear module with an "
            "active lora_A and lora_B was found. Wrap the model with peft.get_peft_model first."
        )
    return weights


def base_name(path: str) -> str:
    """The weight's name before PEFT, and perhaps torch.compile, wrapped the module at ``path``."""
    return path.replace("_orig_mod.", "").removeprefix("base_model.model.") + ".weight"


def layer_of(name: str) -> int | None:
    """The number in a tensor's name, as in ``model.layers.12.mlp.up_proj.weight``."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def _is_trained(module: Any, adapter: str) -> bool:
    if adapter not in module.lora_A:  # an embedding's adapter lives elsewhere
        return False
    weight = module.lora_A[adapter].weight
    return bool(weight.requires_grad) and weight.dim() == 2
