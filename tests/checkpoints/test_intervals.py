from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from layercut.checkpoints.config_edit import edit_config, read_config
from layercut.checkpoints.families import find_rules
from layercut.checkpoints.intervals import derive_marks

S, F, L = "sliding_attention", "full_attention", "linear_attention"


def prune(raw: dict, kept: list[int]) -> dict[str, Any]:
    return edit_config(raw, find_rules(raw["model_type"]), kept)


@pytest.mark.parametrize(
    ("family", "key", "kinds"),
    [
        ("qwen3_next", "full_attention_interval", [L, L, L, F] * 2),
        ("qwen3_5_text", "full_attention_interval", [L, L, L, F] * 2),
        ("gemma3_text", "sliding_window_pattern", [S, S, S, F] * 2),
        ("cohere2", "sliding_window_pattern", [S, S, S, F] * 2),
        ("exaone4", "sliding_window_pattern", [S, S, S, F] * 2),
        ("afmoe", "global_attn_every_n_layers", [S, S, S, F] * 2),
        ("bailing_hybrid", "layer_group_size", [L, L, L, F] * 2),
    ],
)
def test_an_interval_follows_the_kept_layers(family: str, key: str, kinds: list[str]) -> None:
    raw = {"model_type": family, "num_hidden_layers": 8, "layer_types": kinds, key: 4}
    edited = prune(raw, [0, 1, 3, 4, 6, 7])
    assert (edited[key], edited["layer_types"]) == (3, [*kinds[:2], F, *kinds[:2], F])
    assert prune(raw, [0, 1, 2, 3])[key] == 4
    assert prune(raw, [0, 1, 2])[key] == 4  # the fourth would be full
    assert prune(raw, [3, 7])[key] == 1
    uneven = prune(raw, [0, 1, 2, 3, 6, 7])
    assert uneven[key] == 4  # no interval says it: export-check names who reads it
    assert uneven["layer_types"] == [*kinds[:3], F, kinds[0], F]


def test_an_interval_without_a_list_is_all_that_a_pruned_configuration_needs() -> None:
    raw = {"model_type": "qwen3_next", "num_hidden_layers": 8, "full_attention_interval": 4}
    edited = prune(raw, [0, 1, 3, 4, 6, 7])
    assert edited["full_attention_interval"] == 3
    assert read_config(edited).layer_types == [L, L, F, L, L, F]


def test_a_pattern_word_follows_the_kept_layers() -> None:
    kinds = [S, S, S, F] * 2
    raw = {"model_type": "exaone4", "num_hidden_layers": 8, "layer_types": kinds}
    raw |= {"sliding_window_pattern": "LLLG", "sliding_window": 64}
    assert prune(raw, [0, 1, 3, 4, 6, 7])["sliding_window_pattern"] == "LLG"
    assert prune(raw, [0, 1, 2, 3, 6, 7])["sliding_window_pattern"] == "LLLGLG"


def test_rotation_and_experts_by_number_follow_the_kept_layers() -> None:
    text = AutoConfig.for_model("llama4_text", num_hidden_layers=8, interleave_moe_layer_step=2)
    raw = {key: getattr(text, key) for key in ("no_rope_layers", "moe_layers", "layer_types")}
    raw |= {"model_type": "llama4_text", "num_hidden_layers": 8}
    raw |= {"no_rope_layer_interval": 4, "interleave_moe_layer_step": 2}
    edited = prune(raw, [1, 3, 5, 7])
    assert (edited["no_rope_layer_interval"], edited["interleave_moe_layer_step"]) == (2, 1)
    assert (edited["no_rope_layers"], edited["moe_layers"]) == ([1, 0, 1, 0], [0, 1, 2, 3])


@pytest.mark.parametrize("listed", [True, False])
def test_lists_that_count_from_one_follow_the_kept_layers(listed: bool) -> None:
    kinds = [L, L, L, F] * 2
    numbers = {"full_attn_layers": [4, 8], "kda_layers": [1, 2, 3, 5, 6, 7], "head_dim": 4}
    raw = {"model_type": "kimi_linear", "num_hidden_layers": 8, "linear_attn_config": numbers}
    edited = prune(raw | ({"layer_types": kinds} if listed else {}), [0, 1, 3, 4, 7])
    new = {"full_attn_layers": [3, 5], "kda_layers": [1, 2, 4], "head_dim": 4}
    assert edited["linear_attn_config"] == new
    assert read_config(edited).layer_types == [L, L, F, L, F]


def test_a_key_that_never_was_right_stays() -> None:
    raw = {"model_type": "qwen3_next", "num_hidden_layers": 4, "layer_types": [L, F, L, F]}
    assert prune(raw | {"full_attention_interval": 3}, [0, 1])["full_attention_interval"] == 3


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "", "LXG", [4], None, {}])
def test_nonsense_marks_nothing(value: object) -> None:
    assert derive_marks(value, 4) == []


def test_the_first_of_n_layers_is_marked_where_a_family_counts_so() -> None:
    assert derive_marks(3, 4, first=True) == [True, False, False, True]
