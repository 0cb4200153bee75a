"""What becomes of each causal model type of transformers; types in no table must be exact."""

from __future__ import annotations

NOT_BUILT: dict[str, tuple[str, str]] = {
    "emu3": (
        "Unrecognized configuration class",
        "transformers saves its causal half under a type that it does not load",
    ),
    "mllama": (
        "Unrecognized configuration class",
        "transformers saves its causal half under a type that it does not load",
    ),
    "gemma3n": ("timm", "its vision tower needs the package timm; its text model is tested"),
    "gemma4_assistant": ("hidden_size_per_layer_input", "it drafts for another model"),
    "gemma4_unified_assistant": ("layer types", "it drafts for another model"),
    "musicgen": ("dropout", "transformers' causal class does not take its configuration"),
    "musicgen_melody": ("dropout", "transformers' causal class does not take its configuration"),
}
"""Type → a part of transformers' error, and why no toy model of it is built."""

ENCODER = "describes an encoder beside its decoder"
WITH_ENCODER = dict.fromkeys(
    (
        "bart",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "marian",
        "mbart",
        "mvp",
        "pegasus",
        "plbart",
        "prophetnet",
        "whisper",
    ),
    ENCODER,
)
REFUSED: dict[str, str] = {
    **WITH_ENCODER,
    "beam": "residual_add_idx",
    "big_bird": "attention.seed would change",
    "blt": "another stream",
    "cpmant": "learned prompt",
    "diffllama": "lambda_init would change",
    "gemma3n_text": "key-value sharing",
    "gemma4": "key-value sharing|the last layer",
    "gemma4_unified": "the last layer",
    "gemma4_unified_text": "key-value sharing|the last layer",
    "gemma4_text": "key-value sharing|the last layer",
    "gpt_neox_japanese": "the last layer alone adds a bias",
    "longcat_flash": "holds two of the layers",
    "minicpm3": "residual_scale would change",
    "qwen4_exp_text": "only be followed with their content",
    "xlnet": "its tokens see later ones",
    "hrm_text": "two stacks of layers run several times over",
    "hy_v4": "a shared indexer",
    "inkling2_text": "sums of whole groups of earlier layers",
    "jamba": "Drop whole periods",
    "minimax": "linear-attention layer in front",
    "modernbert-decoder": "no norm before its attention",
    "openai-gpt": "return lists",
    "reformer": "which the layer before passes on",
    "zaya": "which the layer before passes on",
    "rwkv": "halves the stream",
    "xlm": "several lists of modules",
    "zamba": "one shared transformer block",
    "zamba2": "one shared transformer block",
}
"""Type → why all or some of its layers cannot be dropped, as layercut says it.

Hybrids that may not lose every layer with keys and values are not listed: that is a rule of all.
"""

TIED = "which of equally scored positions its indexer selects hangs on how many there are"
"""Only beyond as many tokens as it selects; with a rule for ties these are exact (tested)."""
CACHE_INEXACT: dict[str, str] = {
    "axk2": TIED,
    "dots3_note": TIED,
    "dots3_note_text": TIED,
    "glm_moe_dsa": TIED,
    "deepseek_v32": TIED,
    "hy_v4": TIED,
    "moshi": "once its sliding window is exceeded",
}
"""Type → where transformers' own cached logits differ from the uncached ones, unpruned."""

ALIKE = frozenset(
    (
        "apertus",
        "arcee",
        "aria_text",
        "bert",
        "bert-generation",
        "biogpt",
        "bitnet",
        "camembert",
        "codegen",
        "cohere",
        "ctrl",
        "data2vec-text",
        "doge",
        "electra",
        "ernie",
        "ernie4_5",
        "falcon_mamba",
        "flex_olmo",
        "gemma",
        "glm",
        "glm4",
        "gpt-sw3",
        "gpt_bigcode",
        "granitemoe",
        "granitemoeshared",
        "helium",
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "hyperclovax",
        "internlm3",
        "iquestcoder",
        "jais2",
        "jetmoe",
        "mamba2",
        "megatron-bert",
        "minimax_m2",
        "ministral3",
        "nanochat",
        "nemotron",
        "olmo",
        "persimmon",
        "rembert",
        "roberta",
        "roc_bert",
        "roformer",
        "solar_open",
        "trocr",
        "xglm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
        "youtu",
    )
)
"""Types all of whose layers are alike, and only counted; they are tried with ``-m slow``."""
