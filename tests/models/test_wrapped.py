"""Decoders inside multimodal models, prediction layers behind the decoder, other names on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import plan_of
from family_configs import FAMILIES, ODD, ROTARY, WINDOW, Family
from layercut.checkpoints.writer import write_checkpoint
from layercut.errors import ModelError
from layercut.models.load import load
from layercut.models.surgery import apply
from layercut.output.verify import verify_checkpoint
from layercut.types import WeightPatch
from saved_families import NOTHING, identity_logits, save_family, strictly, tokens

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 8,  # as deep as the decoder, which must not be mistaken for it
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
WRAPPER = Family(
    "gemma3",
    {
        "text_config": ROTARY | WINDOW | {"layer_types": ODD, "query_pre_attn_scalar": 4},
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 5,
        "boi_token_index": 6,
        "eoi_token_index": 7,
    },
)


def tensors(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


def test_a_multimodal_models_decoder_is_pruned_and_the_rest_copied(tmp_path: Path) -> None:
    source = save_family(tmp_path / "source", WRAPPER)
    view = load(str(source), dtype="float32")
    plan = plan_of(1, 6, 7, n_layers=8)
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(source, view.layout, plan, NOTHING, out)
    with torch.no_grad():
        logits = strictly(out)(tokens(), use_cache=False).logits
    assert torch.equal(logits, identity_logits(source, view.layout.layers, plan.dropped))
    before, after = tensors(source), tensors(out)
    rest = [name for name in before if "language_model.model.layers" not in name]
    assert any("vision_tower" in name for name in rest)
    assert all(torch.equal(before[name], after[name]) for name in rest)
    old, new = (json.loads((f / "config.json").read_text()) for f in (source, out))
    changed = {k for k, v in old["text_config"].items() if new["text_config"][k] != v}
    assert changed == {"num_hidden_layers", "layer_types"}
    assert old | {"text_config": 0} == new | {"text_config": 0}
    apply(view, plan)
    with torch.no_grad():
        assert torch.equal(view.model(tokens(), use_cache=False).logits, logits)


def test_a_quantisation_that_the_text_decoder_configures_follows_its_layers(
    tmp_path: Path,
) -> None:
    source = save_family(tmp_path / "source", WRAPPER)
    layout = load(str(source), dtype="float32").layout
    config = json.loads((source / "config.json").read_text())
    ignored = [f"{layout.stored}.{layer}.mlp" for layer in (1, 5)]
    config["text_config"]["quantization_config"] = {"quant_method": "x", "ignore": ignored}
    (source / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(source, layout, plan_of(1, n_layers=8), NOTHING, out)
    text = json.loads((out / "config.json").read_text())["text_config"]
    assert text["quantization_config"]["ignore"] == [f"{layout.stored}.4.mlp"]


@pytest.fixture
def with_mtp(tmp_path: Path) -> Path:
    """DeepSeek-V3 with one layer for multi-token prediction, stored as layer 8 of 8."""
    family = FAMILIES["deepseek_v3"]
    settings = family.settings | {"num_nextn_predict_layers": 1}
    source = save_family(tmp_path / "source", Family("deepseek_v3", settings))
    state = tensors(source)
    state |= {
        name.replace("layers.7.", "layers.8."): tensor.clone()
        for name, tensor in state.items()
        if "layers.7." in name
    }
    save_file(state, source / "model.safetensors", {"format": "pt"})
    return source


def test_numbered_prediction_layers_go_and_their_count_becomes_0(
    with_mtp: Path, tmp_path: Path
) -> None:
    view = load(str(with_mtp), dtype="float32")
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(with_mtp, view.layout, plan_of(1, 4, n_layers=8), NOTHING, out)
    config = json.loads((out / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (6, 0)
    with torch.no_grad():
        logits = strictly(out)(tokens(), use_cache=False).logits
        with view.skipping([1, 4]):
            assert torch.equal(view.model(tokens(), use_cache=False).logits, logits)


def test_surplus_layers_that_no_count_announces_are_refused(with_mtp: Path) -> None:
    config = json.loads((with_mtp / "config.json").read_text())
    (with_mtp / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    with pytest.raises(ModelError, match="= 8, the weights hold 9 layers"):
        load(str(with_mtp), dtype="float32")


def test_named_prediction_layers_are_carried_along(tmp_path: Path) -> None:
    source = save_family(tmp_path / "source", FAMILIES["qwen3_next"])
    state = tensors(source)
    state["mtp.norm.weight"] = torch.randn(16)
    save_file(state, source / "model.safetensors", {"format": "pt"})
    view = load(str(source), dtype="float32")
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(source, view.layout, plan_of(0, n_layers=8), NOTHING, out)
    assert torch.equal(tensors(out)["mtp.norm.weight"], state["mtp.norm.weight"])
    strictly(out)


def test_names_without_the_models_prefix_stay_as_they_are(tmp_path: Path) -> None:
    # As the Hub's oldest GPT-2 checkpoints are stored.
    source = save_family(tmp_path / "source", FAMILIES["gpt2 inverse"])
    state = {n.removeprefix("transformer."): t for n, t in tensors(source).items()}
    save_file(state, source / "model.safetensors", {"format": "pt"})
    view = load(str(source), dtype="float32")
    plan = plan_of(1, 4, n_layers=8)
    name = "transformer.h.5.mlp.c_proj.weight"
    patch = WeightPatch({name: torch.randn(64, 16)}, "test")
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(source, view.layout, plan, patch, out)
    assert torch.equal(tensors(out)["h.3.mlp.c_proj.weight"], patch.tensors[name])
    apply(view, plan, patch)
    with torch.no_grad():
        logits = view.model(tokens(), use_cache=False).logits
        assert torch.equal(strictly(out)(tokens(), use_cache=False).logits, logits)


def test_rescaled_queries_agree_in_narrow_dtypes(tmp_path: Path) -> None:
    source = save_family(tmp_path / "source", FAMILIES["gpt2 inverse"])
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    for dtype in ("float32", "bfloat16"):
        view = load(str(source), dtype=dtype)
        plan = plan_of(0, 3, n_layers=8)
        out = tmp_path / dtype
        out.mkdir()
        write_checkpoint(source, view.layout, plan, NOTHING, out)
        apply(view, plan)
        verify_checkpoint(out, view, plan, NOTHING)
