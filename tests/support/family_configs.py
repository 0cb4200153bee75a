"""The 51 tiny configurations of the families that layercut must prune exactly or refuse.

Windows are 4 tokens, so that 14 tokens of text feel them; layer patterns are irregular where the
family allows it, so that a stale pattern is seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VOCABULARY = 259
N_TOKENS = 14

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 2,
}
ROTARY = SMALL | {"head_dim": 4}
WINDOW = {"sliding_window": 4}
GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 8,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "head_dim": 4,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
}
MAMBA = {"mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 2}
MAMBA2 = MAMBA | {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_conv_kernel_dim": 2,
}
SLIDE, FULL, LIN = "sliding_attention", "full_attention", "linear_attention"
ODD = [SLIDE, FULL, SLIDE, SLIDE, FULL, FULL, SLIDE, FULL]
HYBRID = [LIN, LIN, FULL, LIN, FULL, LIN, LIN, FULL]
KV_SHARED = [SLIDE, FULL, SLIDE, SLIDE, FULL, SLIDE, SLIDE, FULL]

DROPS: tuple[tuple[int, ...], ...] = ((0,), (3, 4), (1, 6, 7))


@dataclass(frozen=True, slots=True)
class Family:
    """One configuration and what must become of it.

    Attributes:
        model_type: of the configuration.
        settings: its values.
        drops: layer sets that must come out exact.
        refused: layer sets that must be refused → a part of the reason.
        unprunable: the reason why nothing of this family is pruned.
        tolerance: allowed distance from the dense model with identity layers.
    """

    model_type: str
    settings: dict[str, Any]
    drops: tuple[tuple[int, ...], ...] = DROPS
    refused: dict[tuple[int, ...], str] | None = None
    unprunable: str = ""
    tolerance: float = 0.0


FAMILIES: dict[str, Family] = {
    "afmoe": Family(
        "afmoe",
        ROTARY
        | MOE
        | WINDOW
        | {"num_dense_layers": 2, "layer_types": ODD, "num_shared_experts": 1},
    ),
    "bloom": Family("bloom", GPT | {"hidden_size": 16}),
    "cohere2": Family("cohere2", SMALL | WINDOW | {"layer_types": ODD, "logit_scale": 0.25}),
    "deepseek_v2": Family(
        "deepseek_v2", SMALL | ROUTED | LATENT | {"first_k_dense_replace": 2, "n_shared_experts": 1}
    ),
    "deepseek_v3": Family(
        "deepseek_v3", SMALL | ROUTED | LATENT | {"first_k_dense_replace": 2, "n_shared_experts": 1}
    ),
    "exaone4": Family(
        "exaone4", ROTARY | WINDOW | {"layer_types": ODD, "sliding_window_pattern": 4}
    ),
    "falcon": Family("falcon", SMALL | {"new_decoder_architecture": False, "multi_query": True}),
    "falcon_h1": Family("falcon_h1", ROTARY | MAMBA2 | {"mamba_d_ssm": 32, "mamba_rms_norm": True}),
    "gemma2": Family(
        "gemma2", ROTARY | WINDOW | {"query_pre_attn_scalar": 4, "tie_word_embeddings": True}
    ),
    "gemma3": Family(
        "gemma3_text", ROTARY | WINDOW | {"layer_types": ODD, "query_pre_attn_scalar": 4}
    ),
    "gemma3n": Family(
        "gemma3n_text",
        ROTARY
        | WINDOW
        | {
            "layer_types": KV_SHARED,
            "intermediate_size": [32] * 4 + [24] * 4,
            "activation_sparsity_pattern": [0.9] * 2 + [0.0] * 6,
            "num_kv_shared_layers": 3,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 4,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "tie_word_embeddings": True,
        },
        drops=((0,), (1, 2), (2, 5, 6)),
        refused={(3, 4): "key-value", (4,): "key-value"},
    ),
    "gemma4": Family(
        "gemma4_text",
        ROTARY
        | WINDOW
        | {
            "layer_types": KV_SHARED,
            "num_kv_shared_layers": 3,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 4,
            "global_head_dim": 8,
            "tie_word_embeddings": True,
        },
        drops=((0,), (1, 2), (2, 5, 6)),
        refused={(3, 4): "key-value", (7,): "last"},
    ),
    "glm4_moe": Family(
        "glm4_moe", ROTARY | ROUTED | {"first_k_dense_replace": 2, "n_shared_experts": 1}
    ),
    "gpt2": Family("gpt2", GPT),
    "gpt2 inverse": Family("gpt2", GPT | {"scale_attn_by_inverse_layer_idx": True}, tolerance=5e-7),
    "gpt_neo": Family(
        "gpt_neo",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_layers": 8,
            "num_heads": 4,
            "window_size": 4,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local", "local"], 2], [["local", "global"], 1]],
            "bos_token_id": 1,
            "eos_token_id": 0,
        },
    ),
    "gpt_neox": Family("gpt_neox", SMALL),
    "gpt_oss": Family(
        "gpt_oss",
        ROTARY | WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ODD},
    ),
    "gptj": Family("gptj", GPT | {"rotary_dim": 4}),
    "granite": Family("granite", SMALL | {"logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "granitemoehybrid": Family(
        "granitemoehybrid",
        SMALL
        | MAMBA2
        | {
            "layer_types": ["mamba", "attention", "mamba", "mamba", "attention"] + ["mamba"] * 3,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 8,
            "position_embedding_type": "rope",
        },
    ),
    "jamba": Family(
        "jamba",
        SMALL
        | MAMBA
        | {
            "mamba_dt_rank": 4,
            "attn_layer_period": 4,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "use_mamba_kernels": False,
            "num_hidden_layers": 12,
        },
        drops=((0, 1, 2, 3), (4, 5, 6, 7), (1, 2, 3, 4, 8, 9, 10, 11)),
        refused={(0,): "cannot be expressed", (3, 4): "cannot be expressed"},
    ),
    "lfm2": Family(
        "lfm2",
        ROTARY
        | {
            "layer_types": ["conv", "conv", FULL, "conv", FULL, "conv", "conv", FULL],
            "conv_L_cache": 3,
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "llama": Family("llama", ROTARY | {"attention_bias": True}),
    "llama4": Family(
        "llama4_text",
        ROTARY
        | {
            "intermediate_size_mlp": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 4,
            "no_rope_layers": [1, 1, 1, 0, 1, 0, 1, 1],
            "layer_types": [
                "full_attention" if not rope else "chunked_attention"
                for rope in (1, 1, 1, 0, 1, 0, 1, 1)
            ],
        },
    ),
    "mamba": Family(
        "mamba",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 8,
            "state_size": 4,
            "conv_kernel": 2,
            "time_step_rank": 4,
            "bos_token_id": 1,
            "eos_token_id": 0,
            "pad_token_id": 2,
        },
    ),
    "minimax": Family(
        "minimax",
        ROTARY
        | {
            "layer_types": [FULL, LIN, FULL, LIN, LIN, FULL, LIN, FULL],
            "block_size": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        drops=((1,), (3, 4), (2, 6, 7)),
        refused={(0,): "layer 0"},
    ),
    "mistral": Family("mistral", ROTARY | WINDOW),
    "mixtral": Family(
        "mixtral", ROTARY | WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "modernbert-decoder": Family(
        "modernbert-decoder",
        SMALL
        | {
            "layer_types": ODD,
            "local_attention": 4,
            "global_attn_every_n_layers": 3,
            "cls_token_id": 1,
            "sep_token_id": 0,
            "num_key_value_heads": 4,
        },
        drops=((1,), (3, 4), (2, 6, 7)),
        refused={(0,): "layer 0"},
    ),
    "mpt": Family(
        "mpt",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "n_heads": 4,
            "n_layers": 8,
            "expansion_ratio": 2,
            "max_seq_len": 64,
            "bos_token_id": 1,
            "eos_token_id": 0,
        },
    ),
    "nemotron_h": Family(
        "nemotron_h",
        ROTARY
        | MAMBA2
        | ROUTED
        | {
            "layer_types": ["mamba", "moe", "attention", "mlp", "mamba", "attention", "moe", "mlp"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 4,
            "n_groups": 1,
            "conv_kernel": 2,
            "chunk_size": 4,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": 8,
            "moe_latent_size": None,
        },
    ),
    "olmo2": Family("olmo2", SMALL),
    "olmo3": Family("olmo3", SMALL | WINDOW | {"layer_types": ODD}),
    "olmoe": Family("olmoe", SMALL | {"num_experts": 4, "num_experts_per_tok": 2}),
    "opt": Family(
        "opt",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "ffn_dim": 32,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
            "layerdrop": 0.5,
            "bos_token_id": 1,
            "eos_token_id": 0,
            "pad_token_id": 2,
        },
    ),
    "phi": Family("phi", SMALL),
    "phi3": Family("phi3", SMALL | WINDOW),
    "phimoe": Family("phimoe", SMALL | WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": Family("qwen2", SMALL | WINDOW | {"use_sliding_window": True, "max_window_layers": 3}),
    "qwen2_moe": Family(
        "qwen2_moe",
        SMALL
        | MOE
        | WINDOW
        | {
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "shared_expert_intermediate_size": 8,
            "use_sliding_window": True,
            "max_window_layers": 5,
        },
    ),
    "qwen3": Family(
        "qwen3", ROTARY | WINDOW | {"use_sliding_window": True, "max_window_layers": 3}
    ),
    "qwen3_moe": Family("qwen3_moe", ROTARY | MOE | {"mlp_only_layers": [1, 4]}),
    "qwen3_next": Family(
        "qwen3_next",
        ROTARY
        | MOE
        | LINEAR
        | {"layer_types": HYBRID, "mlp_only_layers": [1], "shared_expert_intermediate_size": 8},
    ),
    "qwen3_5_text": Family("qwen3_5_text", ROTARY | LINEAR | {"layer_types": HYBRID}),
    "recurrent_gemma": Family(
        "recurrent_gemma",
        ROTARY
        | {
            "block_types": ["recurrent", "recurrent", "attention"],
            "attention_window_size": 4,
            "lru_width": 16,
        },
    ),
    "seed_oss": Family("seed_oss", ROTARY),
    "smollm3": Family(
        "smollm3",
        SMALL
        | WINDOW
        | {
            "use_sliding_window": True,
            "no_rope_layers": [1, 0, 1, 1, 1, 0, 0, 1],
            "layer_types": [SLIDE, FULL, SLIDE, SLIDE, SLIDE, FULL, FULL, SLIDE],
        },
    ),
    "stablelm": Family("stablelm", SMALL),
    "starcoder2": Family("starcoder2", SMALL | WINDOW),
    "zamba2": Family(
        "zamba2",
        SMALL
        | MAMBA2
        | {
            "mamba_ngroups": 1,
            "n_mamba_heads": 4,
            "mamba_headdim": 8,
            "num_mem_blocks": 1,
            "layers_block_type": ["mamba", "mamba", "hybrid"] * 2 + ["mamba", "hybrid"],
            "num_key_value_heads": 4,
            "adapter_rank": 4,
            "use_mamba_kernels": False,
            "chunk_size": 4,
        },
        drops=(),
        unprunable="shared",
    ),
}
