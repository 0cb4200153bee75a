"""Whether the pruned configuration builds, in the place of every kept layer, that very layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from layercut.checkpoints.config_edit import NO_MODEL, RESTORE, Json, edit_config, read_config
from layercut.checkpoints.families import COUNT_ATTRIBUTE, INDEX_ATTRIBUTE, INDEX_SCALED_ATTRIBUTES
from layercut.checkpoints.folder import read_json_object
from layercut.checkpoints.hf_calls import guard
from layercut.checkpoints.layout import Layout
from layercut.errors import ModelError


def prune_config(folder: Path, layout: Layout, kept: Sequence[int]) -> Json:
    """The parsed config.json of the pruned model, once it is known to build the kept layers.

    Args:
        folder: the input checkpoint.
        layout: its layout.
        kept: sorted indices of the layers that stay.

    Raises:
        ModelError: the family pins a dropped layer, or a kept layer would become another one.
    """
    raw = read_json_object(folder / "config.json")
    old = build_meta_model(read_config(raw))
    layout.check_dropped(set(range(layout.n_layers)) - set(kept))
    edited = edit_config(raw, layout.rules, kept, with_mtp=layout.carries_mtp)
    new = build_meta_model(read_config(edited))
    exempt = INDEX_SCALED_ATTRIBUTES if layout.index_scaled else frozenset()
    check_same_layers(layout.layer_list(old), layout.layer_list(new), kept, exempt)
    return edited


def build_meta_model(config: Any) -> nn.Module:
    """The model of a configuration, without any memory for its weights.

    Raises:
        ModelError: transformers cannot build it.
    """
    with guard(NO_MODEL, ModelError, RESTORE), torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
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
    new_index = {k: i for i, k in enumerate(kept)}
    for i, (before, after) in enumerate(zip((old[k] for k in kept), new, strict=True)):
        was, becomes = _signature(before, exempt), _signature(after, exempt)
        for name in {**was, **becomes}:
            value, becomes_value = was.get(name), becomes.get(name)
            if value == becomes_value or _is_place(name, value, becomes_value, new_index, len(old)):
                continue
            if isinstance(value, list) and len(value) == len(old):
                value = [value[k] for k in kept]  # an entry for each of the model's layers
            if value != becomes_value:
                raise ModelError(
                    f"layer {kept[i]} cannot be expressed as layer {i} of the pruned model: its "
                    f"{name} would change from {value} to {becomes_value}. Choose other layers."
                )


def _is_place(
    name: str, value: Any, becomes_value: Any, new_index: Mapping[int, int], n_layers: int
) -> bool:
    """Whether an attribute only says where a layer stands, or among how many, and changed so."""
    attribute = name.rpartition(".")[2]
    if COUNT_ATTRIBUTE.fullmatch(attribute):
        return (value, becomes_value) == (n_layers, len(new_index))
    is_index = INDEX_ATTRIBUTE.fullmatch(attribute) is not None
    return is_index and value in new_index and new_index[value] == becomes_value


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
            if plain and not name.startswith("_") and name not in exempt:
                values[f"{prefix}{name}"] = value
    return values
