"""A toy configuration of any causal model type, shrunk from its class's own defaults.

New types join by existing. `SIZES` names what is shrunk; `OVERRIDES` are the few values that the
rules do not get right, with the reason.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import CONFIG_MAPPING

N_LAYERS = 8
VOCABULARY = 259

SIZES: tuple[tuple[str, int], ...] = (
    (r"num_hidden_layers|num_layers|n_layers?|decoder_layers|num_blocks|num_decoder_layers", 8),
    (r"encoder_layers|num_encoder_layers|depth|conf_num_hidden_layers|num_layers_per_stack", 2),
    (r"(.*_)?vocab_size(_per_layer_input|_base)?|audio_vocab_size", VOCABULARY),
    (
        r"(attention|swa)?_?head_dim|index_head_dim|attention_head_size|dim_head|d_head|kv_channels",
        8,
    ),
    (r"linear_(key_|value_)?head_dim|global_head_dim|mamba_(d_head|head_?dim)", 8),
    (r"linear_num_key_heads", 2),
    (r"linear_num_(value_)?heads|index_n_heads", 4),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"n_mamba_heads", 2),
    (r"(swa_)?num_attention_heads|(en|de)coder_attention_heads|n_heads?|num_heads", 4),
    (r"num_(de|en)coder_attention_heads|attention_heads", 4),
    (r"(swa_)?num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups", 2),
    (r"hidden_size|n_embd|d_model|emb_dim|embedding_dim|embedding_size|out_hidden_size", 32),
    (r"(in|out)put_embedding_size|word_embed_proj_dim|lru_width|hidden_size_global", 32),
    (r"moe_(shared_expert_)?intermediate_size|shared_(experts?_)?intermediate_size", 16),
    (r"(dense_)?intermediate_size(_mlp)?|ffn_dim|(en|de)coder_ffn_dim|dff|dim_ff", 64),
    (r"feed_forward_size|d_inner|ffn_hidden_size|mlp_dim", 64),
    (r"expert_ffn_hidden_size", 16),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"(num_|n_|moe_num_)shared_experts", 1),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk?|moe_top_k", 2),
    (r"n_group|topk_group|num_expert_group|n_groups|mamba_n_?groups", 1),
    (r"(q|kv|o)_lora_rank|adapter_rank|laurel_rank|gated_norm_rank|hc_lowrank|d_rel", 8),
    (r"qk_rope_head_dim|rotary_dim", 4),
    (r"qk_nope_head_dim|v_head_dim", 8),
    (r"qk_head_dim", 12),
    (r"hidden_size_per_layer_input|router_hidden_size", 8),
    (r"mamba_d_state|(ssm_)?state_size|time_step_rank|mamba_dt_rank", 4),
    (r"(mamba_)?chunk_size|block_size|index_block_size|keep_window_size", 4),
    (r"index_topk(_blocks)?", 2),
    (r"sliding_window(_size)?|attention_window_size|window_size|local_attention", 4),
    (r"attention_chunk_size|rel_extent|local_attention_window_len", 4),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target)_positions", 64),
    (r"context_length", 64),
    (r"query_pre_attn_scalar", 8),
)
"""Names of sizes → what they become where the class has a number."""

PATTERNS = {
    "layer_types": (0, 1, 0, 0, 1, 1, 0, 1),
    "mlp_layer_types": (0, 1, 1, 0, 1, 0, 1, 1),
    "indexer_types": (0, 1, 1, 0, 0, 1, 0, 1),
    "no_rope_layers": (0, 1, 0, 0, 1, 1, 0, 1),
    "layers_block_type": (0, 1, 0, 0, 1, 1, 0, 1),
}
"""Per-layer lists of two kinds become irregular, so that a stale pattern shows."""

FILLED = {
    "head_dim": 8,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": 8,
}
"""Sizes that some classes leave open and need."""

DERIVED = ("per_layer_config", "qk_head_dim")
"""Values that a class makes of others: they are left to it."""

QSA = {
    "eos_token_id": 0,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
PLE = {"ple_layer_ids": [3, 7], "ple_embed_dim": 32, "heads_per_ngram": 2, "split_ngram_parts": 1}
AUDIO = {"nemo_conv_channels": 8, "ext_pw_out_channel": 8, "depthwise_separable_out_channel": 8}
SLIDE, FULL, CONV = "sliding_attention", "full_attention", "conv"
MAMBA, ATTENTION = "mamba", "attention"
KV_SHARED = {
    "layer_types": [SLIDE, FULL, SLIDE, SLIDE, FULL, SLIDE, SLIDE, FULL],
    "num_kv_shared_layers": 3,
}
SWA = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 8,
    "swa_kv_lora_rank": 8,
    "swa_head_dim": 12,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
    "use_dsa": True,
    "head_dim": 12,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3, 6]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "layer_types": [SLIDE, FULL, SLIDE, SLIDE, FULL, FULL, SLIDE, FULL],
        "rope_parameters": {SLIDE: ROPE, FULL: ROPE},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots3_note": {
        "text_config": SWA,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": SWA,
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_ssm": 64},
    "gemma3n_text": KV_SHARED,
    "gemma4_text": KV_SHARED,
    "gemma4_unified_text": KV_SHARED,
    "git": {"vision_config": {"num_hidden_layers": 2}},
    "granitemoehybrid": {"layer_types": [MAMBA, ATTENTION, MAMBA, MAMBA, ATTENTION] + [MAMBA] * 3},
    "lfm2_moe": {"layer_types": [CONV, CONV, FULL, CONV, FULL, CONV, CONV, FULL]},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {
        "layer_types": [MAMBA, "moe", ATTENTION, "mlp", MAMBA, ATTENTION, "moe", "mlp"],
    },
    "phi4_multimodal": {"audio_config": AUDIO},
    "qwen4_exp": {"text_config": QSA},
    "qwen4_exp_text": QSA | PLE,
    "reformer": {
        "attn_layers": ["local", "lsh", "local", "local", "lsh", "lsh", "local", "lsh"],
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 8],
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
    },
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {
        "n_mamba_heads": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "hybrid_layer_ids": [1, 4, 5, 7],
    },
    "longcat_flash": {"zero_expert_num": 2},
}


def toy_settings(model_type: str) -> dict[str, Any]:
    """Settings of a toy model of any causal model type.

    Raises:
        Exception: whatever the configuration class raises of its own defaults.
    """
    overrides = OVERRIDES.get(model_type, {})
    settings = _shrink(CONFIG_MAPPING[model_type]().to_dict())
    for key in ("model_type", "transformers_version", "architectures", "dtype"):
        settings.pop(key, None)
    return _merge(settings, overrides)


def _merge(settings: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _shrink(section: dict[str, Any]) -> dict[str, Any]:
    n_layers = next(
        (
            section[k]
            for k in ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_blocks")
            if section.get(k)
        ),
        0,
    )
    toy: dict[str, Any] = {}
    n_special = 200
    for key, value in section.items():
        if key in DERIVED:
            continue
        if isinstance(value, dict):
            toy[key] = _shrink(value) if key.endswith("_config") else value
        elif value is None and key in FILLED:
            toy[key] = FILLED[key]
        elif isinstance(value, bool) or value is None:
            toy[key] = True if key in ("use_sliding_window", "is_decoder") else value
        elif isinstance(value, int):
            toy[key] = _shrink_size(key, value)
            if re.fullmatch(r".*_token_(id|index)", key) and value >= VOCABULARY:
                n_special += 1
                toy[key] = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 2}.get(
                    key, n_special
                )
        elif isinstance(value, list) and n_layers and len(value) == n_layers:
            toy[key] = _shrink_list(key, value)
        elif isinstance(value, list) and re.fullmatch(r".*_token_id", key):
            toy[key] = 0
        else:
            toy[key] = value
    heads, kv = section.get("num_attention_heads"), section.get("num_key_value_heads")
    if heads and (heads == kv or section.get("kv_lora_rank")):
        toy["num_key_value_heads"] = 4
    if section.get("qk_rope_head_dim") and section.get("head_dim") == section["qk_rope_head_dim"]:
        toy["head_dim"] = toy["qk_rope_head_dim"]
    return toy


def _shrink_size(key: str, value: int) -> int:
    for pattern, size in SIZES:
        if re.fullmatch(pattern, key):
            return size if value > 0 else value
    return value


def _shrink_list(key: str, value: list[Any]) -> list[Any]:
    if all(type(v) is int for v in value):
        value = [_shrink_size(key, v) for v in value]
    kinds = list(dict.fromkeys(map(str, value)))
    by_name = {str(v): v for v in value}
    if all(isinstance(v, int) for v in value) and value == list(range(len(value))):
        return value[:N_LAYERS]
    if len(kinds) == 2 and key in PATTERNS:
        return [by_name[kinds[i]] for i in PATTERNS[key]]
    first = value[:N_LAYERS]
    for n, kind in enumerate(k for k in kinds if by_name[k] not in first):
        first[-1 - n] = by_name[kind]
    return first
