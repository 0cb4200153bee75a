"""What inference engines assume of a model's layers, as data: each row is one assumption.

An engine that derives a layer's type from its number, or knows a model by how many layers it has,
loads a pruned checkpoint without an error and computes something else. What engines do was read in
their public sources, which move on: a finding means "try it before you rely on it". What they do
with a number of layers alone, such as printing a model's size as 7B, has no row.
"""

from __future__ import annotations

from dataclasses import dataclass

from layercut.checkpoints import export_conditions as when
from layercut.checkpoints.export_conditions import Condition, by_key, every

LLAMA_CPP = "llama.cpp and Ollama"
OLD_READERS = "transformers v4"
MLX = "mlx-lm"


@dataclass(frozen=True, slots=True)
class Rule:
    """One engine's assumption.

    Attributes:
        engine: who makes it.
        families: model types of text decoders it concerns; empty for all.
        condition: whether a configuration breaks it.
        why: what then goes wrong.
        remedy: what to do about it.
        source: where the engine does so.
    """

    engine: str
    families: frozenset[str]
    condition: Condition
    why: str
    remedy: str
    source: str


def _families(*names: str) -> frozenset[str]:
    return frozenset(names)


ANY = _families()
QWEN_HYBRIDS = _families("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
DEEPSEEKS = _families("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu")
DENSE_FIRST = _families(
    "axk1",
    "axk2",
    "bailing_hybrid",
    "deepseek_v32",
    "exaone_moe",
    "glm_moe_dsa",
    "kimi_linear",
    "mistral_large4",
)
WHOLE_PERIODS = "Prune again with selection.preserve_pattern: true."
FULL_LENGTH = "Keep sequences within the window, or use another engine."
OTHER_ENGINE = "Use transformers or vLLM."
ONLY_TRANSFORMERS = "Use transformers, or prune another number of layers."
INTERVAL = "every n-th layer is taken to be full attention, by full_attention_interval alone"
RULES = (
    Rule(
        LLAMA_CPP,
        _families("gemma2", "gpt_oss"),
        every(2),
        "every second layer is taken to slide, by its number",
        WHOLE_PERIODS,
        "llama.cpp src/models/gemma2.cpp, openai-moe.cpp: set_swa_pattern(2)",
    ),
    Rule(
        LLAMA_CPP,
        _families("gemma3_text"),
        every(6),
        "every sixth layer is taken to be global, with another rotary base, at any length",
        WHOLE_PERIODS,
        "llama.cpp src/models/gemma3.cpp: set_swa_pattern(6); Ollama model/models/gemma3: "
        "gemmaGlobalCacheCount",
    ),
    Rule(
        LLAMA_CPP,
        _families("gemma3n_text"),
        every(5),
        "every fifth layer is taken to be global, with another rotary base, at any length",
        OTHER_ENGINE,
        "llama.cpp src/models/gemma3n.cpp: set_swa_pattern(5)",
    ),
    Rule(
        LLAMA_CPP,
        _families("cohere2", "olmo3", "afmoe", "exaone_moe"),
        every(4),
        "every fourth layer is taken to be global, by its number",
        WHOLE_PERIODS,
        "llama.cpp src/models/cohere2.cpp, olmo2.cpp, afmoe.cpp, exaone-moe.cpp: "
        "set_swa_pattern(4); a list of types in the file is passed over where a number is read "
        "(llama-model-loader.cpp: get_key_or_arr)",
    ),
    Rule(
        LLAMA_CPP,
        _families("smollm3", "llama4_text"),
        every(4, when.ROTATION),
        "every fourth layer is taken to be without rotation, by its number",
        WHOLE_PERIODS,
        "llama.cpp src/models/smollm3.cpp, llama4.cpp: n_no_rope_layer_step = 4",
    ),
    Rule(
        LLAMA_CPP,
        _families("exaone4"),
        when.exaone4,
        "only a model of 64 layers is taken to slide, and to rotate its sliding layers alone; then "
        "every fourth layer is global",
        ONLY_TRANSFORMERS,
        "llama.cpp src/models/exaone4.cpp: n_layer() == 64",
    ),
    Rule(
        LLAMA_CPP,
        DEEPSEEKS,
        when.lite,
        "a model without q_lora_rank is known by its 26, 27 or 48 layers, and any other is "
        "expected to have one: loading fails",
        ONLY_TRANSFORMERS,
        "llama.cpp src/models/deepseek2.cpp: is_lite",
    ),
    Rule(
        LLAMA_CPP,
        QWEN_HYBRIDS,
        by_key("full_attention_interval", 4),
        INTERVAL,
        WHOLE_PERIODS,
        "llama.cpp src/models/qwen3next.cpp, qwen35.cpp, qwen35moe.cpp: is_recr_impl",
    ),
    Rule(
        LLAMA_CPP,
        _families("llama4_text"),
        by_key("interleave_moe_layer_step", 1),
        "every n-th layer is taken to have experts, by interleave_moe_layer_step alone",
        WHOLE_PERIODS,
        "llama.cpp src/models/llama4.cpp: n_moe_layer_step",
    ),
    Rule(
        LLAMA_CPP,
        _families("ernie4_5_moe"),
        when.moe_end,
        "moe_layer_end_index is not read: layers behind it are expected to have experts",
        ONLY_TRANSFORMERS,
        "llama.cpp conversion/ernie.py and src/models/ernie4-5.cpp",
    ),
    Rule(
        LLAMA_CPP,
        _families("gemma3n_text"),
        when.first_shared,
        "layers from 20 on are taken to share keys and values",
        OTHER_ENGINE,
        "llama.cpp src/models/gemma3n.cpp: n_layer_kv_from_start = 20",
    ),
    Rule(
        LLAMA_CPP,
        _families("gemma3n_text"),
        when.sparse_first,
        "the first ten layers are taken to have sparse activations",
        OTHER_ENGINE,
        "llama.cpp src/models/models.h: n_layer_sparsity = 10",
    ),
    Rule(
        LLAMA_CPP,
        _families(*when.GEMMA_27B_LAYERS),
        when.count_scale,
        "the attention scale is chosen by the number of layers, which only the 27B model's meets",
        OTHER_ENGINE,
        "llama.cpp src/models/gemma2.cpp, gemma3.cpp: f_attention_scale; Ollama model/models/"
        "gemma2, gemma3: gemma27BLayerCount",
    ),
    Rule(
        LLAMA_CPP,
        _families("qwen2", "qwen3", "qwen3_moe"),
        when.slides,
        "which layers slide is not read: all attend to everything",
        FULL_LENGTH,
        "llama.cpp src/models/qwen2.cpp, qwen3.cpp, qwen3moe.cpp",
    ),
    Rule(
        LLAMA_CPP,
        ANY,
        when.prediction,
        "tensors for multi-token prediction are expected, and loading fails where they are not",
        "Check that they were carried along, or set the count to 0.",
        "llama.cpp issue 24737",
    ),
    Rule(
        "llama.cpp, vLLM, SGLang and mlx-lm",
        DENSE_FIRST,
        when.dense_lead,
        "the first first_k_dense_replace layers are taken to be dense, and no other",
        ONLY_TRANSFORMERS,
        "llama.cpp: n_layer_dense_lead; vLLM and SGLang deepseek_v2.py, mlx-lm deepseek_v3.py: "
        "first_k_dense_replace and moe_layer_freq",
    ),
    Rule(
        "vLLM, SGLang and mlx-lm",
        _families("bailing_hybrid"),
        when.trailing_full,
        "the last layer of each group is taken to be full attention, and so is every layer behind "
        "the last whole group",
        ONLY_TRANSFORMERS,
        "vLLM and SGLang bailing_moe_linear.py, mlx-lm bailing_moe_linear.py: layer_group_size",
    ),
    Rule(
        "llama.cpp, vLLM, SGLang and mlx-lm",
        _families("kimi_linear"),
        when.linear_lists,
        "which layers are full attention is read from linear_attn_config, not from layer_types",
        "Write the kept layers' numbers, counted from 1, into linear_attn_config.",
        "mlx-lm kimi_linear.py, vLLM and SGLang configs/kimi_linear.py: full_attn_layers",
    ),
    Rule(
        "vLLM",
        _families("gpt_oss"),
        every(2),
        "every second layer is taken to slide, by its number",
        WHOLE_PERIODS,
        "vLLM vllm/model_executor/models/gpt_oss.py: layer_idx % 2",
    ),
    Rule(
        "vLLM",
        _families("qwen3", "qwen3_moe"),
        when.slides,
        "layer_types are not read: all layers attend to everything",
        FULL_LENGTH,
        "vLLM issue 39514",
    ),
    Rule(
        "vLLM",
        _families("qwen2"),
        when.window_count,
        "loading fails where max_window_layers is not the number of layers",
        "Use its transformers backend (--model-impl transformers).",
        "vLLM vllm/model_executor/models/qwen2.py, issues 15705 and 17306",
    ),
    Rule(
        "vLLM and SGLang",
        _families("llama4_text"),
        by_key("interleave_moe_layer_step", 1),
        "every n-th layer is taken to have experts, by interleave_moe_layer_step alone",
        WHOLE_PERIODS,
        "vLLM and SGLang models/llama4.py: is_moe_layer",
    ),
    Rule(
        "SGLang and mlx-lm",
        QWEN_HYBRIDS,
        by_key("full_attention_interval", 4),
        INTERVAL,
        WHOLE_PERIODS,
        "SGLang configs/qwen3_next.py: layers_block_type; mlx-lm qwen3_next.py, qwen3_5.py: "
        "is_linear",
    ),
    Rule(
        MLX,
        _families("gemma3_text"),
        by_key("sliding_window_pattern", 6),
        "every n-th layer is taken to be global, by sliding_window_pattern alone",
        WHOLE_PERIODS,
        "mlx-lm gemma3_text.py: is_sliding",
    ),
    Rule(
        MLX,
        _families("cohere2"),
        by_key("sliding_window_pattern", 4),
        "every n-th layer is taken to be global, by sliding_window_pattern alone",
        WHOLE_PERIODS,
        "mlx-lm cohere2.py: use_sliding_window",
    ),
    Rule(
        MLX,
        _families("exaone4"),
        when.exaone4_mlx,
        "which layers slide is read from the word in sliding_window_pattern, and the last one "
        "never does",
        ONLY_TRANSFORMERS,
        "mlx-lm exaone4.py: check_is_sliding",
    ),
    Rule(
        MLX,
        _families("llama4_text"),
        every(4, when.ROTATION),
        "every fourth layer is taken to be global, by its number",
        WHOLE_PERIODS,
        "mlx-lm llama4.py: use_chunked_attention",
    ),
    Rule(
        OLD_READERS,
        ANY,
        when.pattern,
        "versions before 4.53 do not read layer_types and derive them by position",
        WHOLE_PERIODS,
        "transformers 4.52: is_sliding in each model",
    ),
    Rule(
        f"{OLD_READERS} and mlx-lm",
        ANY,
        when.rope,
        "rope_parameters are not read: the rotary base falls back to 10,000, and a scaling or a "
        "partial rotation to none",
        "Add rope_theta, rope_scaling and partial_rotary_factor to config.json as they are inside "
        "rope_parameters.",
        "transformers 4 configurations; mlx-lm rope_utils.py",
    ),
    Rule(
        "vLLM, llama.cpp and Ollama",
        ANY,
        when.index_scale,
        "scale_attn_by_inverse_layer_idx divides by the layer's number, which some ignore",
        "Compare its output with that of transformers.",
        "vLLM vllm/model_executor/models/gpt2.py, llama.cpp src/models/gpt2.cpp",
    ),
)
