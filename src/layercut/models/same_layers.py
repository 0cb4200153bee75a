"""Whether the pruned configuration builds, in the place of every kept layer, that very layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from layercut.errors import ModelError
from layercut.models import shards
from layercut.models.config_edit import Json, edit_config, read_config
from layercut.models.families import INDEX_ATTRIBUTE, INDEX_SCALED_ATTRIBUTES
from layercut.models.layout import Layout
from layercut.models.quiet import INVALID, quiet


def pruned_config(folder: Path, layout: Layout, kept: Sequence[int]) -> Json:
    """The parsed config.json of the pruned model, once it is known to build the kept layers.

    Args:
        folder: the input checkpoint.
        layout: its layout.
        kept: sorted indices of the layers that stay.

    Raises:
        ModelError: the family pins a dropped layer, or a kept layer would become another one.
    """
    raw = shards.read_json_object(folder / "config.json")
    old = meta_model(read_config(raw))
    layout.check_dropped(set(range(layout.n_layers)) - set(kept))
    edited = edit_config(raw, layout.rules, kept, with_mtp=layout.carries_mtp)
    new = meta_model(read_config(edited))
    exempt = INDEX_SCALED_ATTRIBUTES if layout.index_scaled else frozenset()
    check_same_layers(layout.layer_list(old), layout.layer_list(new), kept, exempt)
    return edited


def meta_model(config: Any) -> nn.Module:
    """The model of a configuration, without any memory for its weights.

    Raises:
        ModelError: transformers cannot build it.
    """
    try:
        with quiet(), torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except INVALID as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"config.json does not describe a model: {reason}. Restore the original configuration."
        ) from error
    return model


def check_same_layers(
    old: nn.ModuleList, new: nn.ModuleList, kept: Sequence[int], exempt: frozenset[str]
) -> None:
    """Compare every kept layer with the one that the pruned configuration builds in its place.

    Classes, parameter shapes and plain attributes (windows, scales, flags) of all modules must
    be equal, but for those that say where the layer stands.

    Args:
        old: the dense model's layers.
        new: the pruned model's layers.
        kept: sorted indices of the old layers that stay.
        exempt: attributes that the writer corrects for.

    Raises:
        ModelError: a kept layer would become another one.
    """
    if len(new) != len(kept):
        raise ModelError(
            f"the pruned configuration builds {len(new)} layers instead of {len(kept)}: it cannot "
            "be expressed in this family's configuration. Choose other layers."
        )
    for i, (before, after) in enumerate(zip((old[k] for k in kept), new, strict=True)):
        was = _of_kept(_signature(before, exempt), kept, len(old))
        becomes = _signature(after, exempt)
        if was == becomes:
            continue
        name = next(k for k in {**was, **becomes} if was.get(k) != becomes.get(k))
        raise ModelError(
            f"layer {kept[i]} cannot be expressed as layer {i} of the pruned model: its {name} "
            f"would change from {was.get(name)} to {becomes.get(name)}. Choose other layers."
        )


def _of_kept(values: dict[str, Any], kept: Sequence[int], n_layers: int) -> dict[str, Any]:
    """Some modules hold a list with an entry for each of the model's layers."""
    return {
        name: [value[i] for i in kept]
        if isinstance(value, list) and len(value) == n_layers
        else value
        for name, value in values.items()
    }


def _signature(layer: nn.Module, exempt: frozenset[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for path, module in layer.named_modules():
        prefix = f"{path}." if path else ""
        values[f"{prefix}class"] = type(module).__name__
        for name, tensor in (
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ):
            values[f"{prefix}{name}"] = tensor.shape
        for name, value in vars(module).items():
            plain = isinstance(value, bool | int | float | str | tuple | list | None)
            hidden = name.startswith("_") or name in exempt or INDEX_ATTRIBUTE.fullmatch(name)
            if plain and not hidden:
                values[f"{prefix}{name}"] = value
    return values
