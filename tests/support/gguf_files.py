"""GGUF files of tiny models, laid out as llama.cpp's converter lays them out.

Names come from gguf's own table, which that converter uses; what else it does to tensors (heads
whose rotated pairs lie side by side, norms stored as 1 + weight, stacked experts) is done here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

Array = npt.NDArray[Any]

TOKENS = ["<eos>", "<bos>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
TYPES = [3, 3, 3] + [1] * (len(TOKENS) - 3)
HIDDEN, INNER, HEADS, KV_HEADS, LAYERS, LENGTH = 64, 96, 4, 2, 3, 128


def byte_level_keys(
    tokens: list[str] | None = None,
    types: list[int] | None = None,
    *,
    pre: str | None = "gpt-2",
    merges: Iterable[str] = ("a b",),
) -> dict[str, Any]:
    """The keys of a byte-level tokenizer, those of the ids' roles included."""
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens or TOKENS,
        "tokenizer.ggml.token_type": types or TYPES,
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
    }
    return keys if pre is None else keys | {"tokenizer.ggml.pre": pre}


def llama_keys(**more: Any) -> dict[str, Any]:
    """The keys of a tiny Llama; ``more`` with ``__`` for a dot in a name, ``None`` leaves out."""
    keys = {
        "context_length": LENGTH,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 5000.0,
        "rope.dimension_count": HIDDEN // HEADS,
        "vocab_size": len(TOKENS),
    }
    keys |= {name.replace("__", "."): value for name, value in more.items()}
    return {name: value for name, value in keys.items() if value is not None}


def llama_tensors(n_tokens: int = len(TOKENS)) -> dict[str, Array]:
    """The tensors of a tiny Llama with its own head."""
    rng = np.random.default_rng(0)
    kv = HIDDEN * KV_HEADS // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (n_tokens, HIDDEN),
        "output": (n_tokens, HIDDEN),
        "output_norm": (HIDDEN,),
    }
    for layer in range(LAYERS):
        parts = {
            "attn_norm": (HIDDEN,),
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (kv, HIDDEN),
            "attn_v": (kv, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_norm": (HIDDEN,),
            "ffn_gate": (INNER, HIDDEN),
            "ffn_up": (INNER, HIDDEN),
            "ffn_down": (HIDDEN, INNER),
        }
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in parts.items()}
    return {f"{n}.weight": rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def write_gguf(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    tensors: Mapping[str, Array],
    *,
    quantise: bool = False,
) -> Path:
    """Write a file.

    Args:
        path: a new file.
        architecture: its ``general.architecture``.
        keys: whole names, or names below the architecture's.
        tensors: by their GGUF names.
        quantise: whether matrices are stored in 8 bits.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        own = not key.startswith(("tokenizer.", "general.", "split.", "other."))
        _add(writer, f"{architecture}.{key}" if own else key, value)
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in tensors.items():
        if quantise and tensor.ndim > 1:
            writer.add_tensor(name, gguf.quants.quantize(tensor, q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_llama(path: Path, *, quantise: bool = False, **more: Any) -> Path:
    """A tiny Llama; ``more`` are keys as `llama_keys` takes them, whole ones with ``__``, too."""
    whole = {k.replace("__", "."): v for k, v in more.items() if k.startswith(("tokenizer__",))}
    own = {k: v for k, v in more.items() if not k.startswith("tokenizer__")}
    keys = byte_level_keys() | llama_keys(**own) | whole
    keys = {key: value for key, value in keys.items() if value is not None}
    tensors = llama_tensors(len(keys["tokenizer.ggml.tokens"]))
    return write_gguf(path, "llama", keys, tensors, quantise=quantise)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


def tiny_model(model_type: str, **config: Any) -> Any:
    """A model whose every parameter is random, with the tests' vocabulary."""
    torch.manual_seed(0)
    built = AutoConfig.for_model(
        model_type,
        vocab_size=len(TOKENS),
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=None,
        **config,
    )
    model: Any = AutoModelForCausalLM.from_config(built).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def to_gguf(
    model: Any, architecture: str, folder: Path, *, change: Callable[[str, Array], Array]
) -> dict[str, Array]:
    """A model's tensors by their GGUF names.

    Args:
        model: a model of transformers.
        architecture: as GGUF calls it.
        folder: where the model is saved, for its names on disk.
        change: what the converter does to the tensor of a (transformers) name.
    """
    import gguf
    from safetensors.numpy import load_file

    model.save_pretrained(folder)
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    found: dict[str, Array] = {}
    experts: dict[str, list[Array]] = {}
    for name, tensor in sorted(load_file(folder / "model.safetensors").items(), key=_numbers):
        tensor = change(name, tensor)
        if match := re.fullmatch(r"(.*\.experts)\.\d+\.(\w+)\.weight", name):
            experts.setdefault(f"{match[1]}.{match[2]}", []).append(tensor)
            continue
        found[_gguf_name(names, name)] = tensor
    for name, tensors in experts.items():
        merged = re.sub(r"model\.(layers\.\d+)\.block_sparse_moe", r"\1.feed_forward", name)
        found[_gguf_name(names, f"{merged}.weight")] = np.stack(tensors)
    return found


def _gguf_name(names: Any, name: str) -> str:
    module, kind = name.rsplit(".", 1)
    found = names.get_name(module)
    assert found is not None, name
    return f"{found}.{kind}"


def _numbers(item: tuple[str, Array]) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in item[0].split(".")]


def pairs_side_by_side(n_heads: int, n_kv_heads: int) -> Callable[[str, Array], Array]:
    """What llama.cpp's converter does to the queries and keys of a Llama."""

    def change(name: str, tensor: Array) -> Array:
        for part, heads in (("q_proj", n_heads), ("k_proj", n_kv_heads)):
            if f".{part}." in name:
                halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
                return halves.swapaxes(1, 2).reshape(tensor.shape)
        return tensor

    return change


def norms_plus_one(name: str, tensor: Array) -> Array:
    """What it does to models that scale by 1 + weight."""
    return tensor + 1 if name.endswith("norm.weight") else tensor


def as_it_is(_name: str, tensor: Array) -> Array:
    """What it does to most models."""
    return tensor


def transposed(name: str, tensor: Array) -> Array:
    """What it does to GPT-2."""
    return tensor.T if re.search(r"c_(attn|proj|fc)\.weight$", name) else tensor
