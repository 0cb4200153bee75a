"""Which inference engines would mis-run a checkpoint, told from its config.json alone.

Engines differ in what they read and what they derive from a layer's number. Each row of `RULES` is
one engine's assumption; `CONDITIONS` says when a configuration breaks it. What engines do was read
in their public sources, which move on: a finding means "try it before you rely on it".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

from layercut.checkpoints.folder import read_json_object
from layercut.checkpoints.hf_calls import INVALID, quiet
from layercut.checkpoints.layer_types import derive_layer_types, read_layer_types
from layercut.errors import ModelError

LLAMA_CPP = "llama.cpp and Ollama"
OLD_READERS = "transformers v4"
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
MTP_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
FULL = "full_attention"


@dataclass(frozen=True, slots=True)
class Rule:
    """One engine's assumption.

    Attributes:
        engine: who makes it.
        families: model types of text decoders it concerns; empty for all.
        condition: a key of `CONDITIONS`.
        why: what then goes wrong.
        remedy: what to do about it.
    """

    engine: str
    families: frozenset[str]
    condition: str
    why: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Finding:
    """An engine that would mis-run the checkpoint, why, and what to do."""

    engine: str
    why: str
    remedy: str


def _families(*names: str) -> frozenset[str]:
    return frozenset(names)


ANY = _families()
WHOLE_PERIODS = "Prune again with selection.preserve_pattern: true."
FULL_LENGTH = "Keep sequences within the window, or use another engine."
RULES = (
    Rule(
        LLAMA_CPP,
        _families("gemma2", "gpt_oss"),
        "pattern",
        "every second layer is taken to slide, by its number",
        WHOLE_PERIODS,
    ),
    Rule(
        LLAMA_CPP,
        _families("gemma3_text"),
        "pattern",
        "every sixth layer is taken to be global, with another rotary base, at any length",
        WHOLE_PERIODS,
    ),
    Rule(
        LLAMA_CPP,
        _families("cohere2", "smollm3", "llama4_text"),
        "pattern",
        "every fourth layer is taken to be global or without rotation, by its number",
        WHOLE_PERIODS,
    ),
    Rule(
        LLAMA_CPP,
        _families("gemma3n_text"),
        "first-shared",
        "layers from 20 on are taken to share keys and values",
        "Use transformers or vLLM.",
    ),
    Rule(
        LLAMA_CPP,
        _families(*GEMMA_27B_LAYERS),
        "count-scale",
        "the attention scale is chosen by the number of layers, which only the 27B model's meets",
        "Use transformers or vLLM.",
    ),
    Rule(
        LLAMA_CPP,
        _families("qwen2", "qwen3", "qwen3_moe"),
        "slides",
        "which layers slide is not read: all attend to everything",
        FULL_LENGTH,
    ),
    Rule(
        LLAMA_CPP,
        ANY,
        "mtp",
        "tensors for multi-token prediction are expected, and loading fails where they are not",
        "Check that they were carried along, or set the count to 0.",
    ),
    Rule(
        "vLLM",
        _families("gpt_oss"),
        "pattern",
        "every second layer is taken to slide, by its number",
        WHOLE_PERIODS,
    ),
    Rule(
        "vLLM",
        _families("qwen3", "qwen3_moe"),
        "slides",
        "layer_types are not read: all layers attend to everything",
        FULL_LENGTH,
    ),
    Rule(
        "vLLM",
        _families("qwen2"),
        "some-slide",
        "loading fails where max_window_layers is not the number of layers",
        "Use its transformers backend (--model-impl transformers).",
    ),
    Rule(
        OLD_READERS,
        ANY,
        "pattern",
        "versions before 4.53 do not read layer_types and derive them by position",
        WHOLE_PERIODS,
    ),
    Rule(
        f"{OLD_READERS} and mlx-lm",
        ANY,
        "rope",
        "rope_parameters are not read: the rotary base falls back to 10,000, and a scaling or a "
        "partial rotation to none",
        "Add rope_theta, rope_scaling and partial_rotary_factor to config.json as they are inside "
        "rope_parameters.",
    ),
    Rule(
        "vLLM, llama.cpp and Ollama",
        ANY,
        "index-scale",
        "scale_attn_by_inverse_layer_idx divides by the layer's number, which some ignore",
        "Compare its output with that of transformers.",
    ),
)


class ExportState:
    """What the conditions look at.

    Attributes:
        text: the text decoder's configuration as transformers reads it.
        raw: its keys as they are in the file.
        model_type: its family.
    """

    def __init__(self, text: Any, raw: Mapping[str, Any]) -> None:
        self.text = text
        self.raw = raw
        self.model_type = str(text.model_type)

    def value(self, key: str) -> Any:
        """A key's value, given or default."""
        return getattr(self.text, key, None)

    @property
    def types(self) -> list[str]:
        """Each layer's attention, where the family has unlike ones."""
        return list(self.value("layer_types") or [])


def _pattern(state: ExportState) -> bool:
    return derive_layer_types(state.text) != read_layer_types(state.text)


def _slides(state: ExportState) -> bool:
    return any(kind != FULL for kind in state.types)


def _some_slide(state: ExportState) -> bool:
    return _slides(state) and state.value("max_window_layers") != state.value("num_hidden_layers")


def _first_shared(state: ExportState) -> bool:
    shared = state.value("num_kv_shared_layers") or 0
    return bool(state.value("num_hidden_layers") - shared != GEMMA3N_FIRST_SHARED)


def _count_scale(state: ExportState) -> bool:
    """Whether the engine's scale, chosen by the number of layers, is not the configured one."""
    is_largest = state.value("num_hidden_layers") == GEMMA_27B_LAYERS[state.model_type]
    per_head = state.value("hidden_size") / state.value("num_attention_heads")
    assumed = per_head if is_largest else state.value("head_dim")
    return not math.isclose(assumed, state.value("query_pre_attn_scalar"))


def _rope(state: ExportState) -> bool:
    parameters, raw = state.raw.get("rope_parameters"), state.raw
    if not isinstance(parameters, Mapping):
        return False
    inner = [part for part in parameters.values() if isinstance(part, Mapping)] or [parameters]
    return any(
        old_key not in raw and any(part.get(key, default) != default for part in inner)
        for key, old_key, default in ROPE_KEYS
    )


CONDITIONS: Mapping[str, Callable[[ExportState], bool]] = {
    "pattern": _pattern,
    "slides": _slides,
    "some-slide": _some_slide,
    "first-shared": _first_shared,
    "count-scale": _count_scale,
    "mtp": lambda state: any(state.value(key) for key in MTP_COUNTS),
    "rope": _rope,
    "index-scale": lambda state: bool(state.value("scale_attn_by_inverse_layer_idx")),
}


def export_check(folder: str | Path) -> tuple[Finding, ...]:
    """Engines that would mis-run the checkpoint in ``folder``; empty if none is known to.

    Args:
        folder: a checkpoint; only its config.json is read.

    Raises:
        ModelError: the configuration is missing, damaged, or of no built-in transformers model.
    """
    path = Path(folder) / "config.json"
    raw = read_json_object(path)
    if raw.get("model_type") not in CONFIG_MAPPING:
        raise ModelError(
            f"{path}: transformers does not know the model type {raw.get('model_type')!r}, so its "
            "layer pattern cannot be compared. Choose a checkpoint of a built-in model."
        )
    try:
        with quiet():
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            text = config.get_text_config(decoder=True)
    except INVALID as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{path} does not describe a model: {reason}. Restore the original configuration."
        ) from error
    inner = [part for part in raw.values() if isinstance(part, dict)]
    of_text = [part for part in inner if part.get("model_type") == text.model_type]
    state = ExportState(text, raw if text is config or not of_text else of_text[0])
    return tuple(
        Finding(rule.engine, rule.why, rule.remedy)
        for rule in RULES
        if (not rule.families or state.model_type in rule.families)
        and CONDITIONS[rule.condition](state)
    )
