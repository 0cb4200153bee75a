"""Which method works on which of the 51 configurations; what is in no table works.

``tests/models/test_every_method.py`` runs every method on every one of them and holds them to it.
"""

from __future__ import annotations

SHARED = "cannot work on"
MANY_MAPS = "holds several linear maps"
KERNELS = "cannot have LoRA adapters"
UNEQUAL = "cannot be merged"
BETWEEN = "does not add its MLP's output"
NO_MLP = "has no MLP whose output projection is known"
SCALE = "does not follow the scale"

WHY = {
    SHARED: "later layers read earlier ones' keys and values, so that no layer runs alone",
    MANY_MAPS: "LoRA adapters do not reach experts, or gates by head, in one tensor",
    KERNELS: "fused kernels read weights past their LoRA adapters",
    UNEQUAL: "between layers of one kind alone",
    BETWEEN: "a norm or a factor stands behind the MLP",
    NO_MLP: "its layers have no MLP, or not all of them",
    SCALE: "a norm stands behind the projections, or none in front of them",
}
"""Part of the refusal → what the page of families says."""

UNSCORED = ("gemma3n", "gemma4")
ADAPTERS = {
    MANY_MAPS: (
        "afmoe",
        "deepseek_v2",
        "deepseek_v3",
        "glm4_moe",
        "gpt_oss",
        "granitemoehybrid",
        "jamba",
        "llama4",
        "minimax",
        "mixtral",
        "nemotron_h",
        "olmoe",
        "phimoe",
        "qwen2_moe",
        "qwen3_moe",
        "qwen3_next",
        "recurrent_gemma",
    ),
    KERNELS: ("falcon_h1", "mamba"),
}
FOLDED = {
    BETWEEN: ("afmoe", "exaone4", "gemma2", "gemma3", "granite", "olmo2", "olmo3"),
    NO_MLP: ("mamba", "nemotron_h"),
}
REFUSED: dict[str, dict[str, tuple[str, ...]]] = {
    "igia": ADAPTERS,
    "sign-merge": {**ADAPTERS, UNEQUAL: ("lfm2", "qwen3_5_text")},
    "projection": FOLDED,
    "linear-map": FOLDED,
    "magnitude-rescale": {
        SCALE: (
            "afmoe",
            "exaone4",
            "falcon_h1",
            "gemma2",
            "gemma3",
            "granitemoehybrid",
            "minimax",
            "olmo2",
            "olmo3",
        ),
        NO_MLP: ("mamba", "nemotron_h"),
    },
    "laco": {
        UNEQUAL: (
            "granitemoehybrid",
            "jamba",
            "lfm2",
            "llama4",
            "minimax",
            "nemotron_h",
            "qwen2_moe",
            "qwen3_5_text",
            "qwen3_moe",
            "qwen3_next",
            "recurrent_gemma",
        )
    },
}
"""Method → part of its refusal → the configurations that it refuses."""


def find_refusal(method: str, family: str) -> str | None:
    """Part of the message by which a method refuses a family; ``None``: it works."""
    if family in UNSCORED:
        return SHARED
    reasons = REFUSED.get(method, {})
    return next((why for why, families in reasons.items() if family in families), None)
