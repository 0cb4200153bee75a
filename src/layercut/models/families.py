"""What a layer drop must edit in a model's configuration, as data.

A row names only what differs from "change the layer count". Families that are not listed are
refused: a wrong layer pattern loads without an error and talks nonsense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layercut.errors import ModelError, suggestion


@dataclass(frozen=True, slots=True)
class FamilyRules:
    """How one ``model_type`` stores its layers.

    Attributes:
        layers: module path of the layer list, which is also the prefix of its tensor names.
        norm: module path of the final norm.
        attention_output: path of the attention's output projection inside a layer.
        down_projection: path of the MLP's output projection inside a layer.
        count: configuration key with the number of layers.
        per_layer: keys with one entry per layer; the kept entries stay.
        prefix_counts: keys that mean "the first n layers"; they become the kept ones among those.
    """

    layers: str = "model.layers"
    norm: str = "model.norm"
    attention_output: str = "self_attn.o_proj"
    down_projection: str = "mlp.down_proj"
    count: str = "num_hidden_layers"
    per_layer: tuple[str, ...] = ()
    prefix_counts: tuple[str, ...] = ()


FAMILIES: dict[str, FamilyRules] = {
    "llama": FamilyRules(),
    "mistral": FamilyRules(),
    "qwen2": FamilyRules(per_layer=("layer_types",), prefix_counts=("max_window_layers",)),
    "qwen3": FamilyRules(per_layer=("layer_types",), prefix_counts=("max_window_layers",)),
}


def rules_for(model_type: str) -> FamilyRules:
    """The family's row.

    Raises:
        ModelError: the family is not supported.
    """
    if model_type not in FAMILIES:
        hint = suggestion(model_type, FAMILIES)
        raise ModelError(
            f"model type '{model_type}' is not supported{hint}: layercut prunes "
            f"{', '.join(sorted(FAMILIES))}. Choose a model of one of these families."
        )
    return FAMILIES[model_type]


def edit_config(
    config: dict[str, Any], rules: FamilyRules, kept: Sequence[int], n_layers: int
) -> dict[str, Any]:
    """A copy of ``config`` (the parsed config.json) for the kept layers only.

    Only keys that are present are edited, so that the file keeps its own spelling.

    Raises:
        ModelError: a per-layer key does not have one entry per layer.
    """
    edited = dict(config)
    for key in rules.per_layer:
        if edited.get(key) is None:
            continue
        if len(edited[key]) != n_layers:
            raise ModelError(
                f"config.json: {key} has {len(edited[key])} entries for {n_layers} layers. "
                "Repair the configuration before pruning."
            )
        edited[key] = [edited[key][i] for i in kept]
    for key in rules.prefix_counts:
        if isinstance(edited.get(key), int):
            edited[key] = sum(i < edited[key] for i in kept)
    edited[rules.count] = len(kept)
    return edited
