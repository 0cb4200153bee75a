"""What llama.cpp derives from a layer's number or from how many there are, family by family.

Read in the llama.cpp that llama-cpp-python 0.3.36 holds: `src/models/*.cpp` (``load_arch_hparams``,
``load_arch_tensors`` and the graphs) and `src/llama-model.cpp` (``load_hparams`` and
``load_swa_pattern``). There, most families use the number of layers for a label of the size alone;
those have an empty row. A family without a row is refused, because its rules may stand in code that
no key tells of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GgufRules:
    """What is special about one ``general.architecture``.

    Attributes:
        sliding: which layers slide where no list says so: every one but the n-th of n.
        first_is_full: of such a period the first layer is the one that does not slide.
        always_slides: the period also holds in files that name no window.
        rope_period: every n-th layer is without rotation, by its number; no key tells.
        rope_needs_window: that holds only in files that name a window.
        recurrent_interval: every n-th layer attends where no key or list says so.
        moe_step: whether ``interleave_moe_layer_step`` places the experts by number.
        scale_count: the number of layers whose attention scale is that of the 27B model.
        count_steps: numbers of layers at which the family's members are told apart: a plan must
            not lead from one side of such a number to the other.
        known_counts: groups of numbers of layers by which single members are known; a plan must
            neither leave nor enter one.
        needs_list: the list of sliding layers must be in the file.
        needs_key: a key without which a value is derived from the number of layers.
        no_per_layer_input: whether files with an input of its own for each layer are refused.
        refused: why no layer can be dropped.
    """

    sliding: int = 0
    first_is_full: bool = False
    always_slides: bool = False
    rope_period: int = 0
    rope_needs_window: bool = False
    recurrent_interval: int = 0
    moe_step: bool = False
    scale_count: int = 0
    count_steps: tuple[int, ...] = ()
    known_counts: tuple[tuple[int, ...], ...] = ()
    needs_list: bool = False
    needs_key: str = ""
    no_per_layer_input: bool = False
    refused: str = ""


PLAIN = GgufRules()
PLAIN_FAMILIES: tuple[str, ...] = (
    # Llama and its like
    "llama",
    "arcee",
    "bitnet",
    "deci",
    "exaone",
    "granite",
    "granitemoe",
    "internlm2",
    "mistral3",
    "minicpm3",
    "olmo",
    "olmoe",
    "orion",
    "pangu-embedded",
    "plamo",
    "qwen",
    "qwen2",
    "qwen2moe",
    "qwen2vl",
    "qwen3",
    "qwen3moe",
    "refact",
    "seed_oss",
    "stablelm",
    "xverse",
    "gemma",
    "glm4",
    "chatglm",
    "phi2",
    "phi3",
    "phimoe",
    "ernie4_5",
    "hunyuan-dense",
    "hunyuan-moe",
    "maincoder",
    "apertus",
    "openelm",
    # GPT and its like
    "gpt2",
    "gptneox",
    "bloom",
    "codeshell",
    "dbrx",
    "falcon",
    "jais",
    "jais2",
    "mpt",
    "nemotron",
    "starcoder",
    "starcoder2",
    "arctic",
    "grok",
    # counted by keys that are edited
    "deepseek",
    "dots1",
    "bailingmoe",
    "bailingmoe2",
    "glm4moe",
    "minimax-m2",
    # told apart by lists of heads
    "mamba",
    "mamba2",
    "jamba",
    "granitehybrid",
    "lfm2",
    "lfm2moe",
    "nemotron_h",
    "nemotron_h_moe",
    "falcon-h1",
    "plamo2",
    # the first layers also take images, which a key says
    "qwen3vl",
    "qwen3vlmoe",
)
EVERY_FOURTH = GgufRules(sliding=4)
LINEAR_ATTENTION = GgufRules(recurrent_interval=4)
BY_PLACE: Mapping[str, GgufRules] = {
    "afmoe": GgufRules(sliding=4, rope_period=4),
    "baichuan": GgufRules(refused="its positions are chosen by the number of layers, 32 or 40"),
    "cohere2": GgufRules(sliding=4, always_slides=True),
    "command-r": GgufRules(count_steps=(64,)),
    "deepseek2": GgufRules(known_counts=((26, 27), (47, 48), (48,))),
    "ernie4_5-moe": GgufRules(moe_step=True),
    "exaone4": GgufRules(known_counts=((64,),)),
    "exaone-moe": GgufRules(sliding=4, always_slides=True),
    "gemma2": GgufRules(sliding=2, always_slides=True, scale_count=46),
    "gemma3": GgufRules(sliding=6, scale_count=62),
    "gemma3n": GgufRules(
        refused="its first 20 layers alone have keys and values, and its embeddings hold a part "
        "for each layer"
    ),
    "gemma4": GgufRules(needs_list=True, no_per_layer_input=True),
    "gpt-oss": GgufRules(sliding=2, always_slides=True),
    "llama4": GgufRules(sliding=4, always_slides=True, rope_period=4, moe_step=True),
    "mellum": EVERY_FOURTH,
    "minicpm": GgufRules(needs_key="residual_scale"),
    "minimax-01": GgufRules(refused="each layer's decay is computed from its number"),
    "olmo2": EVERY_FOURTH,
    "plamo3": GgufRules(sliding=8),
    "qwen3next": LINEAR_ATTENTION,
    "qwen35": LINEAR_ATTENTION,
    "qwen35moe": LINEAR_ATTENTION,
    "rwkv6": GgufRules(refused="its weights are halved every few layers, by their numbers"),
    "smallthinker": GgufRules(sliding=4, first_is_full=True, rope_period=4, rope_needs_window=True),
    "smollm3": GgufRules(rope_period=4),
}
RULES: Mapping[str, GgufRules] = {**dict.fromkeys(PLAIN_FAMILIES, PLAIN), **BY_PLACE}

PER_LAYER_LISTS = frozenset(
    {
        "feed_forward_length",
        "expert_feed_forward_length",
        "expert_used_count",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.sliding_window_pattern",
        "attention.recurrent_layers",
        "attention.rope_pattern",
        "activation_sparsity_scale",
        "swiglu_clamp_exp",
        "swiglu_clamp_shexp",
    }
)
"""Keys, behind the family's name, whose lists have one entry per layer."""
PER_LAYER_FREE = frozenset({"xielu.alpha_n", "xielu.alpha_p", "xielu.beta", "xielu.eps"})
"""Such keys without the family's name in front."""
PREFIX_COUNTS = frozenset({"leading_dense_block_count"})
"""Keys that mean "the first n layers"."""
OTHER_LISTS = frozenset({"rope.dimension_sections", "classifier.output_labels"})
"""Lists that have one entry per layer only by chance."""
UNDERSTOOD = frozenset(
    {
        "block_count",
        "nextn_predict_layers",
        "n_deepstack_layers",
        "interleave_moe_layer_step",
        "full_attention_interval",
        "attention.shared_kv_layers",
        "attention.layer_norm_epsilon",
        "attention.layer_norm_rms_epsilon",
        "embedding_length_per_layer_input",
        "ssm.time_step_rank",
    }
)
"""Further keys whose names speak of layers, blocks or steps, and that are known."""
