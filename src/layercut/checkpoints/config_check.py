"""Whether the pruned configuration builds, in the place of every kept layer, that very layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from layercut.checkpoints.quantization import is_quantised
from layercut.checkpoints.safetensors_file import read_stored_tensors
from layercut.checkpoints.tensor_names import find_loading_info, find_surplus, some
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
    config = read_config(edited)
    new = build_meta_model(config)
    exempt = INDEX_SCALED_ATTRIBUTES if layout.index_scaled else frozenset()
    check_same_layers(layout.layer_list(old), layout.layer_list(new), kept, exempt)
    _check_stored(folder, config, layout, kept, old, new)
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
    signatures = [_signature(layer, exempt) for layer in old]
    ordinals = _find_ordinals(signatures)
    for i, (k, after) in enumerate(zip(kept, new, strict=True)):
        was, becomes = signatures[k], _signature(after, exempt)
        for name in {**was, **becomes}:
            value, becomes_value = was.get(name), becomes.get(name)
            if value == becomes_value:
                continue
            is_place = _is_place(name, value, becomes_value, new_index, len(old))
            if is_place and name not in ordinals:
                continue
            if isinstance(value, list) and len(value) == len(old):
                value = [value[k] for k in kept]  # an entry for each of the model's layers
            if value != becomes_value:
                raise ModelError(
                    f"layer {kept[i]} cannot be expressed as layer {i} of the pruned model: its "
                    f"{name} would change from {value} to {becomes_value}. Choose other layers."
                )


def _check_stored(
    folder: Path, config: Any, layout: Layout, kept: Sequence[int], old: nn.Module, new: nn.Module
) -> None:
    """Let transformers match the renamed tensors with the pruned model.

    Where names on disk are not those in memory, a layer's tensors may lie outside of it.

    Raises:
        ModelError: a tensor would be missing, surplus or of another shape.
    """
    stored = read_stored_tensors(folder)
    raw = read_json_object(folder / "config.json")
    if stored.keys() <= old.state_dict().keys() or is_quantised(raw, stored):
        return
    new_index = {k: i for i, k in enumerate(kept)}
    renamed = {}
    for name, tensor in stored.items():
        new_name = layout.new_stored_name(name, new_index)
        dimension = layout.slice_dimension(name)
        if new_name is not None and dimension is not None:
            shape = list(tensor.shape)
            shape[dimension] = shape[dimension] // layout.n_layers * len(kept)
            tensor = replace(tensor, shape=tuple(shape))
        if new_name is not None:
            renamed[new_name] = tensor
    info = find_loading_info(new, renamed)
    names = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    # The configuration of all parts: what only a vision tower reads is no surplus.
    names |= set(find_surplus(config, new, info["unexpected_keys"], renamed))
    if names:
        raise ModelError(
            f"'{layout.model_type}' stores parts of its layers outside of them, so that the pruned "
            f"model would not find {some(sorted(names))} in its place. Choose another model."
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


def _find_ordinals(signatures: Sequence[Mapping[str, Any]]) -> set[str]:
    """Attributes that count the layers which have them, and so do not say where a layer stands."""
    found = set()
    for name in {name for signature in signatures for name in signature}:
        owners = [i for i, signature in enumerate(signatures) if name in signature]
        values = [signatures[i][name] for i in owners]
        if values == list(range(len(owners))) and values != owners:
            found.add(name)
    return found


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
            plain = isinstance(value, bool | int | float | str | tuple | list | dict | set | None)
            if plain and not name.startswith("_") and name not in exempt:
                values[f"{prefix}{name}"] = value
    return values
