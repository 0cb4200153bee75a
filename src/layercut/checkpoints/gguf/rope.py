"""How a GGUF file says that positions are rotated, as transformers' ``rope_parameters``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from layercut.checkpoints.gguf.keys import Keys

Factors = npt.NDArray[np.float32]

UNREAD_YARN = {
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}
"""Keys that llama.cpp reads for grok, mistral3 and deepseek2 alone, and what it takes otherwise."""
LLAMA3_LENGTHS = tuple(1 << n for n in range(10, 18))
"""Context lengths that a Llama 3 may have been trained on before its positions were scaled."""
LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0
"""``low_freq_factor`` and ``high_freq_factor`` of every published Llama 3."""


def rope_parameters(keys: Keys, head_dim: int, *, partial: bool = False) -> dict[str, Any]:
    """The rotary base, its scaling, and the part of each head that is rotated.

    Args:
        keys: of the file's architecture.
        head_dim: numbers per head.
        partial: whether transformers' model can rotate a part of each head.

    Raises:
        ModelError: naming the key that cannot be expressed.
    """
    # What llama.cpp takes where a key is missing.
    parameters: dict[str, Any] = {"rope_theta": keys.number("rope.freq_base", 10000.0)}
    rotated = keys.count("rope.dimension_count", head_dim)
    if rotated != head_dim:
        fraction = rotated / head_dim
        if not partial or int(head_dim * fraction) != rotated:
            raise keys.refuse("rope.dimension_count", f"heads have {head_dim} numbers")
        parameters["partial_rotary_factor"] = fraction
    return parameters | _scaling(keys)


def _scaling(keys: Keys) -> dict[str, Any]:
    kind = keys.word("rope.scaling.type", "linear")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0))
    trained = keys.count("rope.scaling.original_context_length", keys.count("context_length"))
    if kind == "none" or (kind in {"linear", "yarn"} and factor in {0.0, 1.0}):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": trained,
        } | _yarn_scale(keys, factor)
    raise keys.refuse("rope.scaling.type", "layercut cannot carry this scaling over")


def _yarn_scale(keys: Keys, factor: float) -> dict[str, float]:
    """What cosines and sines are multiplied by, where that is not what YaRN's paper says.

    llama.cpp multiplies the paper's scale by the key; transformers takes the product.

    Raises:
        ModelError: a key is set that llama.cpp does not read in this family's files.
    """
    for name, value in UNREAD_YARN.items():
        if keys.number(name, value) != value:
            raise keys.refuse(
                name, f"the original model may need it, but llama.cpp runs the file with {value:g}"
            )
    scale = keys.number("rope.scaling.attn_factor", 1.0)
    if scale == 1:
        return {}
    return {"attention_factor": scale * (1 + 0.1 * math.log(max(1.0, factor)))}


def llama3_scaling(factors: Factors, theta: float) -> dict[str, Any] | None:
    """The scaling of Llama 3.1 whose frequency factors these are.

    Args:
        factors: what each pair's frequency is divided by, (head_dim / 2,).
        theta: the rotary base.

    Returns:
        The scaling's parameters; ``None`` if no known scaling has these factors.
    """
    if bool((factors == 1).all()):
        return {"rope_type": "default"}
    for length in LLAMA3_LENGTHS:
        scaling = {
            "rope_type": "llama3",
            "factor": float(str(factors.max())),
            "low_freq_factor": LLAMA3_LOW,
            "high_freq_factor": LLAMA3_HIGH,
            "original_max_position_embeddings": length,
        }
        expected = _llama3_factors(scaling, theta, len(factors))
        if np.allclose(factors, expected, rtol=1e-5, atol=0):
            return scaling
    return None


def _llama3_factors(scaling: dict[str, Any], theta: float, n_pairs: int) -> Factors:
    """Low frequencies are divided by the factor, high ones stay, between them it is blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * theta ** (-np.arange(n_pairs) / n_pairs)
    kept = np.clip((turns / (2 * math.pi) - low) / (high - low), 0, 1)
    factors: Factors = (1 / ((1 - kept) / scaling["factor"] + kept)).astype(np.float32)
    return factors
