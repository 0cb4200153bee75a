"""When a configuration breaks what an inference engine assumes of a model's layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from layercut.checkpoints.families import MTP_COUNTS
from layercut.checkpoints.intervals import BY_KEY, FULL, Interval, derive_marks, find_marks
from layercut.checkpoints.layer_types import derive_layer_types, read_entries, read_layer_types

DEFAULT_THETA = 10_000.0
ROPE_KEYS = (
    ("rope_theta", "rope_theta", DEFAULT_THETA),
    ("rope_type", "rope_scaling", "default"),
    ("partial_rotary_factor", "partial_rotary_factor", 1.0),
)
"""Key inside rope_parameters, where older readers look for it, what they take without it."""
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3_text": 62}
"""The number of layers by which llama.cpp and Ollama know a 27B model, and choose its scale."""
GEMMA3N_FIRST_SHARED = 20
GEMMA3N_SPARSE = 10
EXAONE4_32B_LAYERS = 64
LITE_LAYERS, KANANA = (26, 27), (48, 128_256)
"""DeepSeek-V2-Lite's and GigaChat's layers, Kanana's layers and vocabulary."""


class ExportState:
    """What the conditions look at.

    Attributes:
        text: the text decoder's configuration as transformers reads it.
        raw: its keys as they are in the file.
        model_type: its family.
        n_layers: its decoder layers.
    """

    def __init__(self, text: Any, raw: Mapping[str, Any]) -> None:
        self.text = text
        self.raw = raw
        self.model_type = str(text.model_type)
        self.n_layers = int(text.num_hidden_layers)

    def value(self, key: str) -> Any:
        """A key's value, as in the file, else given or default."""
        value = self.raw.get(key)
        return getattr(self.text, key, None) if value is None else value

    def number(self, key: str) -> float | None:
        """A key's value if it is a number."""
        value = self.value(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if is_number else None


Condition = Callable[[ExportState], bool]
"""Whether a configuration breaks an assumption."""


TYPES = Interval("")
ROTATION = BY_KEY["no_rope_layer_interval"]


def every(period: int, of: Interval = TYPES) -> Condition:
    """The engine takes the last of every ``period`` layers to be the other ones."""

    def breaks(state: ExportState) -> bool:
        marks = find_marks(state.text, of)
        return bool(marks) and marks != derive_marks(period, state.n_layers)

    return breaks


def by_key(key: str, default: int | str) -> Condition:
    """The engine reads the interval, or takes a default without one."""

    def breaks(state: ExportState) -> bool:
        interval, value = BY_KEY[key], state.value(key)
        marks = find_marks(state.text, interval)
        first = state.model_type in interval.first
        derived = derive_marks(default if value is None else value, state.n_layers, first=first)
        return bool(marks) and marks != derived

    return breaks


def pattern(state: ExportState) -> bool:
    """Not every layer has the type that its number implies in transformers."""
    derived = derive_layer_types(state.text)
    return bool(derived) and derived != read_layer_types(state.text)


def slides(state: ExportState) -> bool:
    """Some layers attend to a window only."""
    return any(kind != FULL for kind in read_entries(state.text, "layer_types"))


def window_count(state: ExportState) -> bool:
    """Some layers slide, and max_window_layers is not the number of layers."""
    return slides(state) and state.value("max_window_layers") != state.n_layers


def exaone4(state: ExportState) -> bool:
    """Layers slide otherwise than in the model of 64 layers, or at all in any other."""
    marks = find_marks(state.text, TYPES)
    period = 4 if state.n_layers == EXAONE4_32B_LAYERS else 1
    return bool(marks) and marks != derive_marks(period, state.n_layers)


def exaone4_mlx(state: ExportState) -> bool:
    """Layers slide otherwise than the pattern word says, or the last one slides."""
    marks = find_marks(state.text, TYPES)
    if not marks or state.value("sliding_window") is None:
        return False
    word = state.value("sliding_window_pattern")
    derived = derive_marks(word, len(marks)) if isinstance(word, str) else [True] * len(marks)
    return marks != [*derived[:-1], True]


def lite(state: ExportState) -> bool:
    """The number of layers says otherwise than q_lora_rank whether queries are compressed."""
    known = state.n_layers in LITE_LAYERS or (state.n_layers, state.value("vocab_size")) == KANANA
    return known != (state.value("q_lora_rank") is None)


def first_shared(state: ExportState) -> bool:
    """The first layer that reuses keys and values is not the one of the dense models."""
    shared = state.number("num_kv_shared_layers") or 0
    return state.n_layers - shared != GEMMA3N_FIRST_SHARED


def sparse_first(state: ExportState) -> bool:
    """The layers with sparse activations are not the first ten."""
    sparse = [bool(share) for share in read_entries(state.text, "activation_sparsity_pattern")]
    return bool(sparse) and sparse != [i < GEMMA3N_SPARSE for i in range(state.n_layers)]


def count_scale(state: ExportState) -> bool:
    """The engine's scale, chosen by the number of layers, is not the configured one."""
    hidden, heads = state.number("hidden_size"), state.number("num_attention_heads")
    per_head, scalar = state.number("head_dim"), state.number("query_pre_attn_scalar")
    if not hidden or not heads or per_head is None or scalar is None:
        return False
    is_largest = state.n_layers == GEMMA_27B_LAYERS[state.model_type]
    return not math.isclose(hidden // heads if is_largest else per_head, scalar)


def dense_lead(state: ExportState) -> bool:
    """The dense layers are not the first ones, as many as the configuration counts."""
    kinds = read_entries(state.text, "mlp_layer_types")
    stated = state.number("first_k_dense_replace")
    every_nth = state.number("moe_layer_freq") or 1
    if not kinds or not all(isinstance(kind, str) for kind in kinds):
        return False
    lead = next((i for i, kind in enumerate(kinds) if kind != "dense"), len(kinds))
    first = lead if stated is None else stated
    derived = [i < first or bool(i % every_nth) for i in range(len(kinds))]
    return derived != [kind == "dense" for kind in kinds]


def trailing_full(state: ExportState) -> bool:
    """The layers that do not fill a group are not all full, as the engines take them to be."""
    size, marks = state.number("layer_group_size"), find_marks(state.text, TYPES)
    if not size or not marks:
        return False
    whole = state.n_layers // size * size
    return marks != [(i + 1) % size == 0 or i >= whole for i in range(state.n_layers)]


def linear_lists(state: ExportState) -> bool:
    """The lists inside linear_attn_config, which count from 1, name other layers."""
    inner = state.raw.get("linear_attn_config")
    listed = inner.get("full_attn_layers") if isinstance(inner, Mapping) else None
    marks = find_marks(state.text, TYPES)
    return isinstance(listed, list) and listed != [i + 1 for i, mark in enumerate(marks) if mark]


def moe_end(state: ExportState) -> bool:
    """Layers behind the last mixture of experts are dense."""
    end = state.number("moe_layer_end_index")
    return end is not None and end not in (-1, state.n_layers - 1)


def prediction(state: ExportState) -> bool:
    """Layers for multi-token prediction are counted."""
    return any(state.value(key) for key in MTP_COUNTS)


def rope(state: ExportState) -> bool:
    """A rotary base, a scaling or a partial rotation stands in rope_parameters alone."""
    parameters, raw = state.raw.get("rope_parameters"), state.raw
    if not isinstance(parameters, Mapping):
        return False
    inner = [part for part in parameters.values() if isinstance(part, Mapping)] or [parameters]
    return any(
        old_key not in raw and any(part.get(key, default) != default for part in inner)
        for key, old_key, default in ROPE_KEYS
    )


def index_scale(state: ExportState) -> bool:
    """Attention is divided by the layer's number."""
    return bool(state.value("scale_attn_by_inverse_layer_idx"))
