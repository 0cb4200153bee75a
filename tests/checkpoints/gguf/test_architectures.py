"""Every architecture that is read: transformers' model → llama.cpp's file → the model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gguf_files import (
    as_it_is,
    byte_level_keys,
    norms_plus_one,
    pairs_side_by_side,
    tiny_model,
    to_gguf,
    transposed,
    write_gguf,
)
from layercut.checkpoints.gguf.architectures import ARCHITECTURES
from layercut.checkpoints.gguf.keys import Keys
from layercut.checkpoints.gguf.rope import _llama3_factors, rope_parameters
from layercut.errors import ModelError
from layercut.models.load import load

pytest.importorskip("gguf")

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
KEYS: dict[str, Any] = {
    "context_length": 64,
    "embedding_length": 32,
    "block_count": 4,
    "feed_forward_length": 48,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}
RMS = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 5000.0}
NORM = {"attention.layer_norm_epsilon": 1e-5, "rope.freq_base": 5000.0}
WIDE = {"attention.key_length": 16, "attention.value_length": 16}
THETA = {"rope_theta": 5000.0, "rope_type": "default"}
SLIDES = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
LONG, SHORT = [1.0, 1.5, 2.0, 4.0], [1.0, 1.0, 1.25, 1.5]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

EPS: dict[str, dict[str, Any]] = {
    "gpt2": {"layer_norm_epsilon": 1e-5},
    "nemotron": {"norm_eps": 1e-5},
    "stablelm": {"layer_norm_eps": 1e-5},
    "starcoder2": {"norm_epsilon": 1e-5},
}

Change = Callable[[str, Any], Any]
PAIRS = pairs_side_by_side(4, 2)
Case = tuple[str, str, dict[str, Any], dict[str, Any], Change]
# name: GGUF's architecture, transformers' model type, its configuration, the file's keys, layout.
CASES: dict[str, Case] = {
    "llama": ("llama", "llama", {"rope_parameters": THETA}, RMS, PAIRS),
    "llama, tied": (
        "llama",
        "llama",
        {"tie_word_embeddings": True},
        RMS | {"rope.freq_base": 1e4},
        PAIRS,
    ),
    "llama, all biases": (
        "llama",
        "llama",
        {"rope_parameters": THETA, "attention_bias": True, "mlp_bias": True},
        RMS,
        PAIRS,
    ),
    "llama, wide heads": (
        "llama",
        "llama",
        {"rope_parameters": THETA, "head_dim": 16},
        RMS | WIDE | {"rope.dimension_count": 16},
        PAIRS,
    ),
    "llama, linear scaling": (
        "llama",
        "llama",
        {"rope_parameters": THETA | {"rope_type": "linear", "factor": 4.0}},
        RMS | {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        PAIRS,
    ),
    "llama, yarn": (
        "llama",
        "llama",
        {
            "rope_parameters": THETA
            | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
        },
        RMS
        | {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
        },
        PAIRS,
    ),
    "llama, yarn with a scale": (
        "llama",
        "llama",
        {
            "rope_parameters": THETA
            | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
            # 1.5 (1 + 0.1 ln 4)
            | {"attention_factor": 1.707944154167984}
        },
        RMS
        | {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.attn_factor": 1.5,
        },
        PAIRS,
    ),
    "llama 3.2": (
        "llama",
        "llama",
        {"rope_parameters": LLAMA3},
        RMS | {"rope.freq_base": 5e5},
        PAIRS,
    ),
    "mistral": (
        "llama",
        "mistral",
        {"rope_parameters": THETA, "sliding_window": None},
        RMS | {"general.name": "mistral"},
        PAIRS,
    ),
    "mixtral": (
        "llama",
        "mixtral",
        {"rope_parameters": THETA, "num_local_experts": 4, "num_experts_per_tok": 2},
        RMS | {"expert_count": 4, "expert_used_count": 2},
        PAIRS,
    ),
    "qwen2": ("qwen2", "qwen2", {"rope_parameters": THETA, "rms_norm_eps": 1e-5}, RMS, as_it_is),
    "qwen2moe": (
        "qwen2moe",
        "qwen2_moe",
        {
            "rope_parameters": THETA,
            "rms_norm_eps": 1e-5,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
        },
        RMS
        | {
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 24,
            "expert_shared_feed_forward_length": 40,
        },
        lambda name, t: t[0] if name.endswith("shared_expert_gate.weight") else t,
    ),
    "qwen3": (
        "qwen3",
        "qwen3",
        {"rope_parameters": THETA, "rms_norm_eps": 1e-5, "head_dim": 16},
        RMS | WIDE,
        as_it_is,
    ),
    "qwen3moe": (
        "qwen3moe",
        "qwen3_moe",
        {
            "rope_parameters": THETA,
            "rms_norm_eps": 1e-5,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
        RMS | WIDE | {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 24},
        as_it_is,
    ),
    "gemma2": (
        "gemma2",
        "gemma2",
        {
            "rope_parameters": THETA,
            "rms_norm_eps": 1e-5,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
        RMS
        | WIDE
        | {
            "attention.sliding_window": 8,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
        norms_plus_one,
    ),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": THETA | {"rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "rms_norm_eps": 1e-5,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "layer_types": SLIDES,
        },
        RMS
        | WIDE
        | {
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": [kind.startswith("slid") for kind in SLIDES],
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        norms_plus_one,
    ),
    "phi3": (
        "phi3",
        "phi3",
        {
            "rope_parameters": THETA,
            "original_max_position_embeddings": 64,
            "sliding_window": 8,
            "tie_word_embeddings": False,
        },
        RMS | {"attention.sliding_window": 8, "rope.scaling.original_context_length": 64},
        as_it_is,
    ),
    "phi3, long": (
        "phi3",
        "phi3",
        {
            "rope_parameters": THETA
            | {
                "rope_type": "longrope",
                "long_factor": LONG,
                "short_factor": SHORT,
                "original_max_position_embeddings": 16,
            },
            "original_max_position_embeddings": 16,
            "tie_word_embeddings": False,
        },
        RMS
        | {
            "rope.scaling.original_context_length": 16,
            "rope.scaling.attn_factor": 1.2247448713915890,
        },
        as_it_is,
    ),
    "starcoder2": (
        "starcoder2",
        "starcoder2",
        {"rope_parameters": THETA, "sliding_window": None, "tie_word_embeddings": True},
        NORM,
        as_it_is,
    ),
    "stablelm": (
        "stablelm",
        "stablelm",
        {"rope_parameters": THETA | {"partial_rotary_factor": 0.25}, "use_qkv_bias": True},
        NORM | {"rope.dimension_count": 2, "use_parallel_residual": False},
        as_it_is,
    ),
    "nemotron": (
        "nemotron",
        "nemotron",
        {"rope_parameters": THETA | {"partial_rotary_factor": 0.5}, "head_dim": None},
        NORM | {"rope.dimension_count": 4},
        norms_plus_one,
    ),
    "gpt2": (
        "gpt2",
        "gpt2",
        {},
        {"attention.layer_norm_epsilon": 1e-5, "attention.head_count_kv": 4},
        transposed,
    ),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERCUT_CACHE", str(tmp_path / "cache"))


def rope_tensors(model: Any) -> dict[str, Any]:
    """The scaling's factors that the converter writes as tensors."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope, rope["rope_theta"], 4)}
    if rope.get("rope_type") == "longrope":
        return {
            "rope_factors_long.weight": np.array(LONG, dtype=np.float32),
            "rope_factors_short.weight": np.array(SHORT, dtype=np.float32),
        }
    return {}


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_the_one_that_was_written(tmp_path: Path, name: str) -> None:
    architecture, model_type, config, keys, change = CASES[name]
    sizes = SIZES
    if model_type == "gpt2":
        sizes = {"n_embd": 32, "n_inner": 48, "n_layer": 4, "n_head": 4, "n_positions": 64}
    rms = (
        {}
        if "epsilon" in " ".join(NORM) and keys.keys() & NORM.keys() - RMS.keys()
        else {"rms_norm_eps": 1e-5}
    )
    model = tiny_model(model_type, **(sizes | (rms if model_type != "gpt2" else {}) | config))
    tensors = to_gguf(model, architecture, tmp_path / "model", change=change) | rope_tensors(model)
    path = write_gguf(tmp_path / "m.gguf", architecture, byte_level_keys() | KEYS | keys, tensors)
    view = load(str(path), dtype="float32")
    ids = torch.randint(
        0, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        found = view.model(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    read = sum(t.size for name, t in tensors.items() if not name.startswith("rope_"))
    assert read == sum(p.numel() for p in view.model.parameters())


def test_every_architecture_that_is_read_is_held_against_transformers() -> None:
    assert {case[0] for case in CASES.values()} == set(ARCHITECTURES)


def test_what_transformers_could_convert_but_is_not_known_to_be_exact_is_refused(
    tmp_path: Path,
) -> None:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    for name in set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"} - set(ARCHITECTURES):
        path = write_gguf(tmp_path / f"{name}.gguf", name, byte_level_keys() | KEYS, {})
        with pytest.raises(ModelError, match=f"does not read the architecture '{name}' from GGUF"):
            load(str(path))


def test_biases_that_llama_cpp_does_without_are_zero(tmp_path: Path) -> None:
    settings = SIZES | {"rope_parameters": THETA, "attention_bias": True, "mlp_bias": True}
    model = tiny_model("llama", rms_norm_eps=1e-5, **settings)
    left_out = [n for n, _ in model.named_parameters() if re.search(r"(o|gate|down)_proj.bias", n)]
    left_out += ["model.layers.0.self_attn.q_proj.bias"]
    with torch.no_grad():
        for name in left_out:
            model.get_parameter(name).zero_()
    tensors = to_gguf(model, "llama", tmp_path / "model", change=PAIRS)
    absent = {name for name, value in tensors.items() if name.endswith("bias") and not value.any()}
    assert len(absent) == len(left_out)
    kept = {name: value for name, value in tensors.items() if name not in absent}
    path = write_gguf(tmp_path / "m.gguf", "llama", byte_level_keys() | KEYS | RMS, kept)
    view = load(str(path), dtype="float32")
    ids = torch.arange(24)[None]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        found = view.model(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("factor", "scale"), [(4.0, 1.0), (40.0, 0.8), (0.5, 1.25)])
def test_yarn_rotates_by_the_angles_of_llama_cpp(factor: float, scale: float) -> None:
    # ggml's rope_yarn and ggml_rope_yarn_corr_dims, and llama-context.cpp's yarn_attn_factor.
    n, base, trained = 64, 5e4, 2048
    places = [n * np.log(trained / (r * 2 * np.pi)) / (2 * np.log(base)) for r in (32, 1)]
    low, high = max(0, np.floor(places[0])), min(n - 1, np.ceil(places[1]))
    ramp = 1 - np.clip((np.arange(n // 2) - low) / max(0.001, high - low), 0, 1)
    whole = base ** (-2 * np.arange(n // 2) / n)
    angles = whole / factor * (1 - ramp) + whole * ramp
    cancelled = (1 + 0.1 * np.log(factor)) if factor > 1 else 1.0
    length = cancelled / (1 + 0.1 * np.log(factor)) * scale * (1 + 0.1 * np.log(factor))

    values = {"general.architecture": "llama", "llama.rope.freq_base": base}
    values |= {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": factor}
    values |= {"llama.rope.scaling.original_context_length": trained}
    values |= {"llama.context_length": 8192, "llama.rope.scaling.attn_factor": scale}
    raw = rope_parameters(Keys(Path("m.gguf"), values, ()), n)
    config = LlamaConfig(head_dim=n, rope_parameters=raw, max_position_embeddings=8192)
    found = LlamaRotaryEmbedding(config)
    np.testing.assert_allclose(found.inv_freq.numpy(), angles, rtol=1e-5)
    assert found.attention_scaling == pytest.approx(length)
