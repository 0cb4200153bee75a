"""What a GGUF file says and the checkpoint cannot say is refused by name; nothing is filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_files import (
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    TOKENS,
    byte_level_keys,
    llama_keys,
    llama_tensors,
    write_gguf,
    write_llama,
)
from layercut.errors import ModelError
from layercut.models.load import load

pytest.importorskip("gguf")

HEAD = HIDDEN // HEADS


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERCUT_CACHE", str(tmp_path / "cache"))


def each(name: str, *shape: int) -> dict[str, Any]:
    """One tensor in every block."""
    return {f"blk.{i}.{name}": np.ones(shape, np.float32) for i in range(LAYERS)}


def experts(n: int = 4) -> dict[str, Any]:
    stacks = {"ffn_gate_inp": (n, HIDDEN), "ffn_gate_exps": (n, INNER, HIDDEN)}
    stacks |= {"ffn_up_exps": (n, INNER, HIDDEN), "ffn_down_exps": (n, HIDDEN, INNER)}
    return {
        k: v for name, shape in stacks.items() for k, v in each(f"{name}.weight", *shape).items()
    }


def dense(tensors: dict[str, Any]) -> dict[str, Any]:
    return {n: t for n, t in tensors.items() if ".ffn_" not in n or "norm" in n}


KEY_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "not causal": ({"attention.causal": False}, r"llama\.attention\.causal = False"),
    "pooling": ({"pooling_type": 1}, r"llama\.pooling_type = 1"),
    "scale of attention": ({"attention.scale": 0.5}, r"llama\.attention\.scale = 0\.5"),
    "scale of logits": ({"logit_scale": 0.25}, r"llama\.logit_scale"),
    "softcap": ({"final_logit_softcapping": 30.0}, r"llama\.final_logit_softcapping = 30"),
    "window": ({"attention.sliding_window": 16}, r"llama\.attention\.sliding_window = 16"),
    "heads by layer": (
        {"attention.head_count_kv": [2, 2, 4]},
        r"llama\.attention\.head_count_kv = \[2, 2, 4\]: layers that differ",
    ),
    "width by layer": ({"feed_forward_length": [96, 96, 48]}, "layers that differ"),
    "value heads": ({"attention.value_length": 8}, r"llama\.attention\.value_length = 8"),
    "part of a head": ({"rope.dimension_count": 8}, r"llama\.rope\.dimension_count = 8"),
    "long rope": ({"rope.scaling.type": "longrope"}, r"llama\.rope\.scaling\.type = longrope"),
    "yarn's own": (
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.yarn_beta_fast": 8.0,
        },
        r"llama\.rope\.scaling\.yarn_beta_fast = 8.0: .* llama\.cpp runs the file with 32\.",
    ),
    "attention factor": ({"rope.scaling.attn_factor": 1.5}, r"llama\.rope\.scaling\.attn_factor"),
    "prediction layers": ({"nextn_predict_layers": 1}, r"llama\.nextn_predict_layers = 1"),
    "leading dense": ({"leading_dense_block_count": 1}, r"llama\.leading_dense_block_count = 1"),
    "gating": ({"expert_gating_func": 2}, r"llama\.expert_gating_func = 2"),
    "shared experts": ({"expert_shared_count": 1}, r"llama\.expert_shared_count = 1"),
    "unheard of": ({"attention.sinks_of_tomorrow": 3}, r"llama\.attention\.sinks_of_tomorrow = 3"),
    "no eps": (
        {"attention.layer_norm_rms_epsilon": None},
        r"lacks the key llama\.attention\.layer",
    ),
    "vocabulary": ({"vocab_size": 7}, r"260 tokens and 260 rows .* vocab_size = 7"),
    "more layers": ({"block_count": 4}, r"llama\.block_count = 4: it holds tensors of 3 blocks"),
    "fewer layers": ({"block_count": 2}, r"llama\.block_count = 2: it holds tensors of 3 blocks"),
}
TENSOR_FAULTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "norms of heads": (
        lambda t: t | each("attn_q_norm.weight", HEAD),
        {},
        r"holds blk\.0\.attn_q_norm\.weight.*'llama' has no place",
    ),
    "frequencies that are no Llama 3's": (
        lambda t: t | {"rope_freqs.weight": np.array([1.0] * 3 + [32.0] * 5)},
        {},
        r"scales its positions by rope_freqs\.weight",
    ),
    "experts that no key speaks of": (
        lambda t: t | experts(),
        {},
        r"blk\.0\.ffn_\w+_exps\.weight has shape .*its keys speak of 0 experts",
    ),
    "experts in name only": (
        lambda t: t,
        {"expert_count": 4, "expert_used_count": 2},
        r"holds blk\.0\.ffn_down\.weight.*'mixtral' has no place",
    ),
    "an expert's projection missing": (
        lambda t: {n: x for n, x in (dense(t) | experts()).items() if "blk.1.ffn_up_exps" not in n},
        {"expert_count": 4, "expert_used_count": 2},
        r"does not hold all parts of its experts|holds nothing for",
    ),
    "fewer experts than the key says": (
        lambda t: dense(t) | experts(3),
        {"expert_count": 4, "expert_used_count": 2},
        r"blk\.0\.ffn_\w+\.weight has shape \[3, .*its keys speak of 4 experts",
    ),
    "a missing tensor": (
        lambda t: {n: x for n, x in t.items() if n != "blk.1.ffn_down.weight"},
        {},
        r"holds nothing for model\.layers\.1\.mlp\.down_proj\.weight",
    ),
    "another shape": (
        lambda t: t | {"blk.2.ffn_up.weight": np.ones((INNER // 2, HIDDEN))},
        {},
        r"blk\.2\.ffn_up\.weight has shape \[48, 64\]",
    ),
    "an odd name": (lambda t: t | {"blk.0.attn_q": np.ones(3)}, {}, r"holds blk\.0\.attn_q:"),
    "scales of another quantisation": (
        lambda t: t | each("attn_q.scale", 1),
        {},
        r"holds blk\.0\.attn_q\.scale",
    ),
}


@pytest.mark.parametrize("fault", KEY_FAULTS)
def test_a_key_that_cannot_be_carried_over_is_named(tmp_path: Path, fault: str) -> None:
    changed, why = KEY_FAULTS[fault]
    keys = byte_level_keys() | llama_keys(**changed)
    path = write_gguf(tmp_path / "tiny.gguf", "llama", keys, llama_tensors())
    with pytest.raises(ModelError, match=why):
        load(str(path))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_a_tensor_without_a_place_or_a_place_without_a_tensor_is_named(
    tmp_path: Path, fault: str
) -> None:
    change, more, why = TENSOR_FAULTS[fault]
    keys = byte_level_keys() | llama_keys(**more)
    path = write_gguf(tmp_path / "tiny.gguf", "llama", keys, change(llama_tensors()))
    with pytest.raises(ModelError, match=why):
        load(str(path))
    assert not (tmp_path / "cache").exists()


def test_keys_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    path = write_llama(
        tmp_path / "tiny.gguf",
        attention__causal=True,
        attention__scale=0.0,
        expert_count=0,
        expert_used_count=0,
        logit_scale=1.0,
        pooling_type=0,
        attention__sliding_window=0,
        rope__scaling__type="none",
        rope__scaling__factor=8.0,
        attention__head_count_kv=[KV_HEADS] * LAYERS,
    )
    config = load(str(path), dtype="float32").model.config
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5000.0}
    assert config.vocab_size == len(TOKENS)


def test_absent_keys_mean_what_they_mean_to_llama_cpp(tmp_path: Path) -> None:
    path = write_llama(
        tmp_path / "tiny.gguf",
        rope__freq_base=None,
        rope__dimension_count=None,
        rope__scaling__factor=4.0,
        vocab_size=None,
    )
    rope = load(str(path), dtype="float32").model.config.rope_parameters
    assert rope == {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}


def test_the_parts_of_a_split_model_are_read_together(tmp_path: Path) -> None:
    tensors = llama_tensors()
    whole = load(
        str(write_gguf(tmp_path / "w.gguf", "llama", byte_level_keys() | llama_keys(), tensors)),
        dtype="float32",
    ).model.state_dict()
    names = list(tensors)
    for number, part in enumerate((names[:10], names[10:])):
        keys = byte_level_keys() | llama_keys() if number == 0 else {}
        keys |= {"split.no": number, "split.count": 2, "split.tensors.count": len(names)}
        path = tmp_path / f"s-{number + 1:05}-of-00002.gguf"
        write_gguf(path, "llama", keys, {name: tensors[name] for name in part})
    found = load(str(tmp_path / "s-00001-of-00002.gguf"), dtype="float32").model.state_dict()
    assert found.keys() == whole.keys()
    assert all((found[name] == tensor).all() for name, tensor in whole.items())
