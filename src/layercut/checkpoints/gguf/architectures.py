"""The architectures of GGUF files that layercut reads: which tensor and key becomes what.

A tensor's name is ``PART.KIND`` or ``blk.N.PART.KIND``. The tables hold the parts; a part that is
in no table, or that transformers' model has no place for, refuses the file. What a missing key
means is what llama.cpp takes in its place (src/llama-model.cpp and src/models/*.cpp there).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from layercut.checkpoints.gguf.keys import Keys
from layercut.checkpoints.gguf.rope import rope_parameters

Config = dict[str, Any]

OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
}
MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2",
}
SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GPT2_OUTER = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
GPT2_BLOCK = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one architecture becomes transformers' model.

    Attributes:
        configure: the keys → the configuration, with its ``model_type``.
        parts: parts of a block → modules of a layer, as they are named on disk.
        outer: parts outside of the blocks → modules.
        layers: the list of layers that ``parts`` are below.
        interleaved: whether GGUF keeps the two numbers that a rotation pairs side by side, where
            transformers keeps the halves of a head apart.
        norm_offset: whether GGUF stores norms as 1 + weight.
        transposed: parts whose matrices transformers keeps as (in, out).
    """

    configure: Callable[[Keys], Config]
    parts: Mapping[str, str]
    outer: Mapping[str, str]
    layers: str = "model.layers"
    interleaved: bool = False
    norm_offset: bool = False
    transposed: frozenset[str] = frozenset()


def _decoder(keys: Keys, *, partial: bool = False, eps: str = "rms_norm_eps") -> Config:
    """What nearly all architectures say in the same keys."""
    hidden, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", hidden // max(heads, 1))
    if keys.count("attention.value_length", head_dim) != head_dim:
        raise keys.refuse("attention.value_length", f"keys have {head_dim} numbers per head")
    gguf_eps = "layer_norm_rms_epsilon" if eps == "rms_norm_eps" else "layer_norm_epsilon"
    return {
        "hidden_size": hidden,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.count("context_length"),
        eps: keys.number(f"attention.{gguf_eps}"),
        "rope_parameters": rope_parameters(keys, head_dim, partial=partial),
        "tie_word_embeddings": "output.weight" not in keys.tensors,
    }


def _without_head_dim(keys: Keys, config: Config) -> Config:
    """For configurations that derive the heads' width from the model's."""
    if config.pop("head_dim") * config["num_attention_heads"] != config["hidden_size"]:
        raise keys.refuse("attention.key_length", "heads must share the width of the model")
    return config


def _llama(keys: Keys) -> Config:
    config = _decoder(keys)
    if keys.count("expert_count", 0):
        # Renormalised over the chosen experts, which is all that Mixtral and llama.cpp know.
        width = keys.count("expert_feed_forward_length", config["intermediate_size"])
        return (
            config
            | _router(keys, "num_local_experts")
            | {
                "model_type": "mixtral",
                "intermediate_size": width,
            }
        )
    return config | {
        "model_type": "llama",
        "attention_bias": _has_bias(keys, "attn_q", "attn_k", "attn_v", "attn_output"),
        "mlp_bias": _has_bias(keys, *GATED),
    }


def _has_bias(keys: Keys, *parts: str) -> bool:
    """Whether any block has a bias in one of these parts; those that are left out are zero."""
    names = {f"{part}.bias" for part in parts}
    return any(name.split(".", 2)[-1] in names for name in keys.tensors)


def _router(keys: Keys, count: str) -> Config:
    return {
        count: keys.count("expert_count"),
        "num_experts_per_tok": keys.count("expert_used_count"),
    }


def _qwen2(keys: Keys) -> Config:
    return _without_head_dim(keys, _decoder(keys)) | {"model_type": "qwen2"}


def _qwen3(keys: Keys) -> Config:
    return _decoder(keys) | {"model_type": "qwen3"}


def _qwen2moe(keys: Keys) -> Config:
    config = _without_head_dim(keys, _decoder(keys)) | _router(keys, "num_experts")
    width = config["intermediate_size"]
    per_expert = width // max(config["num_experts_per_tok"], 1)
    return config | {
        "model_type": "qwen2_moe",
        "norm_topk_prob": False,
        "moe_intermediate_size": keys.count("expert_feed_forward_length", per_expert),
        "shared_expert_intermediate_size": keys.count("expert_shared_feed_forward_length", width),
    }


def _qwen3moe(keys: Keys) -> Config:
    return (
        _decoder(keys)
        | _router(keys, "num_experts")
        | {
            "model_type": "qwen3_moe",
            "norm_topk_prob": True,
            "moe_intermediate_size": keys.count("expert_feed_forward_length"),
        }
    )


def _gemma_scale(keys: Keys, config: Config, largest: int) -> int:
    """llama.cpp knows the largest model, which scales otherwise, by its number of layers."""
    if config["num_hidden_layers"] == largest:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _layer_types(keys: Keys, n_layers: int, period: int) -> list[str]:
    """``sliding_attention`` or ``full_attention``: as listed, or all but each period's last."""
    slides = keys.per_layer("attention.sliding_window_pattern")
    if slides is None or (isinstance(slides, int) and not isinstance(slides, bool)):
        period = period if slides is None else slides
        slides = [period == 0 or i % period < period - 1 for i in range(n_layers)]
    if not isinstance(slides, list) or len(slides) != n_layers:
        raise keys.refuse("attention.sliding_window_pattern", f"there are {n_layers} layers")
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def _gemma2(keys: Keys) -> Config:
    config = _decoder(keys)
    theta = config["rope_parameters"]["rope_theta"]
    if keys.number("rope.freq_base_swa", theta) != theta:
        raise keys.refuse("rope.freq_base_swa", "Gemma 2 has one rotary base")
    return config | {
        "model_type": "gemma2",
        "sliding_window": keys.count("attention.sliding_window", 4096),
        "layer_types": _layer_types(keys, config["num_hidden_layers"], 2),
        "query_pre_attn_scalar": _gemma_scale(keys, config, 46),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
    }


def _gemma3(keys: Keys) -> Config:
    config = _decoder(keys)
    window = keys.count("attention.sliding_window", 0)
    n_layers = config["num_hidden_layers"]
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    return config | {
        "model_type": "gemma3_text",
        "sliding_window": window or 4096,
        "layer_types": _layer_types(keys, n_layers, 6) if window else ["full_attention"] * n_layers,
        "query_pre_attn_scalar": _gemma_scale(keys, config, 62),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0.0) or None,
        # Only layers that see everything have their positions scaled.
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": local,
        },
    }


def _phi3(keys: Keys) -> Config:
    config = _without_head_dim(keys, _decoder(keys, partial=True))
    trained = keys.count("rope.scaling.original_context_length", config["max_position_embeddings"])
    return config | {
        "model_type": "phi3",
        "original_max_position_embeddings": trained,
        "sliding_window": keys.count("attention.sliding_window", 0) or None,
    }


def _starcoder2(keys: Keys) -> Config:
    config = _without_head_dim(keys, _decoder(keys, eps="norm_epsilon"))
    return config | {"model_type": "starcoder2", "sliding_window": None, "use_bias": True}


def _stablelm(keys: Keys) -> Config:
    config = _without_head_dim(keys, _decoder(keys, partial=True, eps="layer_norm_eps"))
    parallel = "blk.0.ffn_norm.weight" not in keys.tensors
    if bool(keys.per_layer("use_parallel_residual")) != parallel:
        raise keys.refuse("use_parallel_residual", "its tensors say otherwise")
    return config | {
        "model_type": "stablelm",
        "use_parallel_residual": parallel,
        "use_qkv_bias": "blk.0.attn_q.bias" in keys.tensors,
    }


def _nemotron(keys: Keys) -> Config:
    return _decoder(keys, partial=True, eps="norm_eps") | {"model_type": "nemotron"}


def _gpt2(keys: Keys) -> Config:
    heads, length = keys.count("attention.head_count"), keys.count("context_length")
    if keys.count("attention.head_count_kv", heads) != heads:
        raise keys.refuse("attention.head_count_kv", "GPT-2 has as many as it has query heads")
    return {
        "model_type": "gpt2",
        "n_embd": keys.count("embedding_length"),
        "n_inner": keys.count("feed_forward_length"),
        "n_layer": keys.count("block_count"),
        "n_head": heads,
        "n_positions": length,
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "tie_word_embeddings": "output.weight" not in keys.tensors,
    }


ARCHITECTURES: Mapping[str, Architecture] = {
    "gemma2": Architecture(_gemma2, ATTENTION | GATED | GEMMA_NORMS, OUTER, norm_offset=True),
    "gemma3": Architecture(
        _gemma3, ATTENTION | GATED | HEAD_NORMS | GEMMA_NORMS, OUTER, norm_offset=True
    ),
    "gpt2": Architecture(
        _gpt2,
        GPT2_BLOCK,
        GPT2_OUTER,
        layers="transformer.h",
        transposed=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
    ),
    "llama": Architecture(_llama, ATTENTION | GATED | MIXTRAL, OUTER, interleaved=True),
    "nemotron": Architecture(_nemotron, ATTENTION | GATED, OUTER, norm_offset=True),
    "phi3": Architecture(
        _phi3,
        {
            "attn_norm": "input_layernorm",
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        OUTER,
    ),
    "qwen2": Architecture(_qwen2, ATTENTION | GATED, OUTER),
    "qwen2moe": Architecture(_qwen2moe, ATTENTION | EXPERTS | SHARED_EXPERT, OUTER),
    "qwen3": Architecture(_qwen3, ATTENTION | GATED | HEAD_NORMS, OUTER),
    "qwen3moe": Architecture(_qwen3moe, ATTENTION | HEAD_NORMS | EXPERTS, OUTER),
    "stablelm": Architecture(_stablelm, ATTENTION | GATED, OUTER),
    "starcoder2": Architecture(
        _starcoder2, ATTENTION | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}, OUTER
    ),
}
"""By ``general.architecture``. Each is held against transformers' own model in the tests."""
