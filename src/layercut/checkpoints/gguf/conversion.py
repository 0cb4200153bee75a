"""The model that a GGUF file holds: each tensor read once, each parameter filled once.

No model is built in memory. Every tensor of the file is given its name in transformers' checkpoint,
transformers says on empty tensors what it would miss or ignore, and the contents are dequantised
one at a time while the checkpoint is written.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import AutoConfig

from layercut.checkpoints.config_check import build_meta_model
from layercut.checkpoints.gguf.architectures import ARCHITECTURES, Architecture
from layercut.checkpoints.gguf.dequantised import Dequantised, zero_biases
from layercut.checkpoints.gguf.header import TENSOR_TYPES, GgufTensor
from layercut.checkpoints.gguf.keys import ORIGINAL, Keys
from layercut.checkpoints.gguf.rope import llama3_scaling
from layercut.checkpoints.hf_calls import guard
from layercut.checkpoints.safetensors_file import StoredTensor
from layercut.checkpoints.tensor_names import find_loading_info, some
from layercut.errors import ModelError

ROPE_FREQUENCIES = "rope_freqs.weight"
ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


@dataclass(frozen=True, slots=True)
class ConvertedModel:
    """A file's model, accounted for on both sides.

    Attributes:
        config: transformers' configuration.
        contents: the checkpoint's tensors by name.
    """

    config: Any
    contents: Mapping[str, Dequantised | Tensor]


def plan_conversion(
    path: Path,
    values: Mapping[str, Any],
    tensors: Mapping[str, GgufTensor],
    special_ids: Mapping[str, int | None],
) -> ConvertedModel:
    """The model of a file, once every key and tensor of it has a place.

    Args:
        path: the file, for messages.
        values: its keys.
        tensors: its tensors by name.
        special_ids: the configuration's ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``.

    Raises:
        ModelError: naming what cannot be carried over, or what is missing.
    """
    by_name = dict(tensors)
    _check_types(path, by_name)
    keys = Keys(path, values, by_name)
    if keys.architecture not in ARCHITECTURES:
        raise ModelError(
            f"{path}: layercut does not read the architecture '{keys.architecture}' from GGUF "
            f"files (it reads {', '.join(ARCHITECTURES)}). {ORIGINAL}"
        )
    architecture = ARCHITECTURES[keys.architecture]
    raw = architecture.configure(keys)
    _check_blocks(keys, raw)
    scaling = _take_rope_factors(keys, by_name, raw)
    if scaling:
        raw["rope_parameters"] = raw["rope_parameters"] | scaling
    raw["vocab_size"] = _vocab_size(keys, values, by_name)
    keys.check_all_read()
    config = _build_config(path, raw | dict(special_ids))
    named, sources = _name_tensors(path, by_name, architecture, raw)
    contents = named | zero_biases(named, raw)
    _check_complete(path, config, contents, sources)
    return ConvertedModel(config, contents)


def _check_types(path: Path, tensors: Mapping[str, GgufTensor]) -> None:
    """Refuse types that cannot be dequantised, before anything is converted."""
    from gguf import GGMLQuantizationType, dequantize  # an optional extra

    for number, count in Counter(tensor.number for tensor in tensors.values()).items():
        kind, _, width = TENSOR_TYPES[number]
        what = f"{path} stores {count} tensors as {kind}, which cannot be dequantised"
        with guard(what, ModelError, ORIGINAL):
            dequantize(np.zeros((1, width), np.uint8), GGMLQuantizationType(number))


def _check_blocks(keys: Keys, raw: dict[str, Any]) -> None:
    """Hold the number of layers against the tensors before a model of that many is built."""
    blocks = {name.split(".")[1] for name in keys.tensors if name.startswith("blk.")}
    count = raw.get("num_hidden_layers", raw.get("n_layer"))
    if count != len(blocks):
        raise keys.refuse("block_count", f"it holds tensors of {len(blocks)} blocks")


def _take_rope_factors(
    keys: Keys, tensors: dict[str, GgufTensor], raw: dict[str, Any]
) -> dict[str, Any]:
    """The scaling that the file gives as one factor for each pair; its tensors count as read."""
    given = {name: tensors.pop(name) for name in _rope_tensors(raw) if name in tensors}
    if not given:
        return {}
    factors = {name: Dequantised(t, t.shape).read() for name, t in given.items()}
    head_dim = keys.count("attention.key_length", raw["hidden_size"] // raw["num_attention_heads"])
    n_pairs = keys.count("rope.dimension_count", head_dim) // 2
    for name, values in factors.items():
        if values.shape != (n_pairs,):
            raise ModelError(
                f"{keys.path}: {name} has shape {list(values.shape)}, and {n_pairs} pairs of each "
                f"head are rotated. {ORIGINAL}"
            )
    if ROPE_FREQUENCIES in factors:
        scaling = llama3_scaling(factors[ROPE_FREQUENCIES], raw["rope_parameters"]["rope_theta"])
        if scaling is None or raw["rope_parameters"]["rope_type"] != "default":
            raise ModelError(
                f"{keys.path} scales its positions by {ROPE_FREQUENCIES}, whose factors are not "
                f"those of a Llama 3. {ORIGINAL}"
            )
        return scaling
    if len(factors) != 2:
        raise ModelError(f"{keys.path} holds only one of {ROPE_LONG} and {ROPE_SHORT}. {ORIGINAL}")
    return {
        "rope_type": "longrope",
        "long_factor": [float(str(f)) for f in factors[ROPE_LONG]],
        "short_factor": [float(str(f)) for f in factors[ROPE_SHORT]],
        "original_max_position_embeddings": raw["original_max_position_embeddings"],
        "attention_factor": keys.number("rope.scaling.attn_factor", 1.0),
    }


def _rope_tensors(raw: dict[str, Any]) -> tuple[str, ...]:
    if raw["model_type"] in {"llama", "mixtral"}:
        return (ROPE_FREQUENCIES,)
    return (ROPE_LONG, ROPE_SHORT) if raw["model_type"] == "phi3" else ()


def _vocab_size(keys: Keys, values: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> int:
    tokens = values.get("tokenizer.ggml.tokens")
    n_tokens = len(tokens) if isinstance(tokens, list) else 0
    rows = tensors["token_embd.weight"].shape[-1] if "token_embd.weight" in tensors else n_tokens
    if not n_tokens == rows == keys.count("vocab_size", n_tokens):
        raise ModelError(
            f"{keys.path} has {n_tokens} tokens and {rows} rows of token embeddings, and says "
            f"vocab_size = {keys.count('vocab_size', n_tokens)}. {ORIGINAL}"
        )
    return n_tokens


def _build_config(path: Path, raw: dict[str, Any]) -> Any:
    with guard(f"{path} does not describe a model", ModelError, ORIGINAL):
        return AutoConfig.for_model(dtype="float32", **raw)


def _name_tensors(
    path: Path, tensors: Mapping[str, GgufTensor], architecture: Architecture, raw: dict[str, Any]
) -> tuple[dict[str, Dequantised], dict[str, str]]:
    """The checkpoint's tensors by name, and the file's tensor that each one comes from.

    Raises:
        ModelError: a tensor is none of the architecture's.
    """
    contents: dict[str, Dequantised] = {}
    unknown, sources = [], {}
    for name, tensor in tensors.items():
        module, _, kind = _find_module(name, architecture).rpartition(".")
        if not module:
            unknown.append(name)
            continue
        whole = f"{module}.{kind}"
        for target, content in _contents(name, tensor, whole, architecture, raw):
            contents[target], sources[target] = content, name
    if unknown:
        raise ModelError(
            f"{path} holds {some(sorted(unknown))}: transformers' '{raw['model_type']}' has no "
            f"place for that. {ORIGINAL}"
        )
    return contents, sources


def _find_module(name: str, architecture: Architecture) -> str:
    """``blk.3.attn_q.weight`` → ``model.layers.3.self_attn.q_proj.weight``; empty if unknown."""
    *place, part, kind = name.split(".") if name.count(".") in {1, 3} else ("", "", "")
    if not place and part in architecture.outer:
        return f"{architecture.outer[part]}.{kind}"
    if len(place) == 2 and place[0] == "blk" and part in architecture.parts:
        return f"{architecture.layers}.{place[1]}.{architecture.parts[part]}.{kind}"
    return ""


def _contents(
    name: str, tensor: GgufTensor, target: str, architecture: Architecture, raw: dict[str, Any]
) -> Iterator[tuple[str, Dequantised]]:
    """What one tensor of the file becomes: one tensor, or one for each expert.

    Raises:
        ModelError: it does not hold as many experts as its keys say.
    """
    part, kind = name.split(".")[-2:]
    shape = tensor.shape[::-1]
    if "{expert}" in target:
        n_experts = raw.get("num_local_experts", raw.get("num_experts", 0))
        if len(shape) != 3 or shape[0] != n_experts:
            raise ModelError(
                f"{tensor.path}: {name} has shape {list(shape)}, its keys speak of {n_experts} "
                f"experts. {ORIGINAL}"
            )
        for expert in range(shape[0]):
            yield target.format(expert=expert), Dequantised(tensor, shape[1:], expert)
        return
    if part == "ffn_gate_inp_shexp":  # a row, stored as a vector
        yield target, Dequantised(tensor, (1, shape[-1]))
        return
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    n_heads = raw[heads[part]] if architecture.interleaved and part in heads else 0
    if n_heads and (shape[0] % n_heads or shape[0] // n_heads % 2):
        n_heads = 0  # a wrong shape, which is refused with all others
    transpose = part in architecture.transposed and len(shape) == 2
    offset = float(architecture.norm_offset and part.endswith("norm") and kind == "weight")
    yield (
        target,
        Dequantised(
            tensor,
            shape[::-1] if transpose else shape,
            n_heads=n_heads,
            offset=offset,
            transpose=transpose,
        ),
    )


def _check_complete(
    path: Path,
    config: Any,
    contents: Mapping[str, Dequantised | Tensor],
    sources: Mapping[str, str],
) -> None:
    """Let transformers say what it would fill, ignore or not fit, and count on both sides.

    Raises:
        ModelError: a tensor is missing, surplus or of another shape.
    """
    model: Any = build_meta_model(config)
    config.architectures = [type(model).__name__]
    headers = {n: StoredTensor(path, "F32", tuple(c.shape), 0, 0) for n, c in contents.items()}
    try:
        info = find_loading_info(model, headers)
    except ModelError as error:
        raise ModelError(
            f"{path} does not hold all parts of its experts, {config.num_hidden_layers} layers of "
            f"them. {ORIGINAL}"
        ) from error
    if surplus := sorted({sources.get(name, name) for name in info["unexpected_keys"]}):
        raise ModelError(
            f"{path} holds {some(surplus)}: transformers' '{config.model_type}' has no place for "
            f"that. {ORIGINAL}"
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{path} holds nothing for {some(missing)}, without which the model is another one. "
            f"{ORIGINAL}"
        )
    for name, shape, wanted in info["mismatched_keys"]:
        raise ModelError(
            f"{path}: {sources.get(name, name)} has shape {list(shape)}, its keys make it "
            f"{list(wanted)}. {ORIGINAL}"
        )
    n_stored = sum(math.prod(content.shape) for content in contents.values())
    n_filled = sum(parameter.numel() for parameter in model.parameters())
    if n_stored != n_filled:
        raise ModelError(
            f"{path} holds {n_stored:,} numbers, its model {n_filled:,}: layercut cannot tell "
            f"which are which. {ORIGINAL}"
        )
