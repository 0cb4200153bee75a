"""LoRA adapters on every linear sub-layer: put in, and taken out again."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from transformers.pytorch_utils import Conv1D

from layercut.models.view import DecoderView
from layercut.recipe.finetune import AdapterConfig

NOT_ADAPTED = dict.fromkeys(
    ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), ("out_proj", "conv1d")
)
"""Model type → modules that PEFT refuses: fused kernels read their weights past the adapters."""


def adapted_names(view: DecoderView) -> list[str]:
    """Names of the weights that get adapters: those of all linear sub-layers that may have one."""
    names = (name for layer in range(view.n_layers) for name in view.linear_modules(layer))
    refused = list_not_adapted(view)
    return [name for name in names if name.split(".")[-2] not in refused]


def list_not_adapted(view: DecoderView) -> list[str]:
    """Last parts of the names of linear sub-layers that adapters cannot stand on."""
    refused = NOT_ADAPTED.get(view.model.config.model_type, ())
    names = {name.split(".")[-2] for i in range(view.n_layers) for name in view.linear_modules(i)}
    return sorted(names.intersection(refused))


def adapters_on(view: DecoderView, lora: AdapterConfig) -> LoraConfig:
    """PEFT's configuration of adapters on `adapted_names`."""
    weights = adapted_names(view)
    modules = {name.removesuffix(".weight").rpartition(".")[2] for name in weights}
    transposed = isinstance(view.model.get_submodule(weights[0].removesuffix(".weight")), Conv1D)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(modules),
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )


def detach(view: DecoderView, trainer: Any) -> None:
    """Make ``view.model`` a plain, frozen model again, without adapters; its own weights stay."""
    if hasattr(view.model, "peft_config"):
        trainer.model.unload()
    # TRL and accelerate wrap `forward` per instance; the plain model's is its class's.
    for name in ("forward", "_original_forward", "_is_accelerate_prepared", "model_tags"):
        vars(view.model).pop(name, None)
    view.model.eval().requires_grad_(False)
    view.model.zero_grad(set_to_none=True)
