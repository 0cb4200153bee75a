"""Checkpoints of several parts, of which transformers loads one as a causal language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from conftest import plan_of, save_with_noise
from family_configs import LINEAR, ROTARY, WINDOW
from layercut.errors import ModelError
from layercut.models.load import load
from layercut.models.surgery import apply
from layercut.output.save import save
from layercut.pipeline.prune_files import prune
from layercut.types import WeightPatch
from quantised_siblings import edit_config
from saved_families import tokens

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "patch_size": 4}
DEEP = TOWER | {"num_hidden_layers": 8, "image_size": 16}
COMPOSITES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": ROTARY | WINDOW | {"query_pre_attn_scalar": 4, "tie_word_embeddings": True},
        "vision_config": DEEP,
        "mm_tokens_per_image": 4,
        "image_token_index": 5,
        "boi_token_index": 6,
        "eoi_token_index": 7,
    },
    "qwen3_5": {
        "text_config": ROTARY | LINEAR | {"tie_word_embeddings": True, "mtp_num_hidden_layers": 1},
        "tie_word_embeddings": True,
        "vision_config": TOWER
        | {"depth": 8, "num_heads": 2, "out_hidden_size": 16, "num_position_embeddings": 16},
    },
    "llama4": {
        "text_config": ROTARY
        | {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 32},
        "vision_config": DEEP
        | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    },
}
MTP = {"mtp.layers.0.mlp.up_proj.weight": torch.randn(4, 4), "mtp.norm.weight": torch.randn(4)}


def save_composite(folder: Path, model_type: str) -> Path:
    """A checkpoint as published, with prediction layers where the family has them."""
    config = AutoConfig.for_model(model_type, **COMPOSITES[model_type])
    save_with_noise(folder, config, AutoModelForImageTextToText, scale=0.05)
    if model_type == "qwen3_5":
        change(folder, MTP)
    return folder


def change(folder: Path, more: dict[str, torch.Tensor]) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(state | more, folder / "model.safetensors", {"format": "pt"})


@torch.no_grad()
def logits_of(folder: Path, table: Any) -> torch.Tensor:
    model, info = table.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] | info["mismatched_keys"]
    if table is AutoModelForImageTextToText:
        assert not info["unexpected_keys"]
    return model.eval()(tokens(), use_cache=False).logits


@pytest.mark.parametrize("model_type", COMPOSITES)
def test_the_text_decoder_is_pruned_and_the_other_parts_copied(
    tmp_path: Path, model_type: str
) -> None:
    source = save_composite(tmp_path / "source", model_type)
    view, dropped = load(str(source), dtype="float32"), (1, 6)
    with torch.no_grad(), view.skipping(dropped):
        expected = view.model(tokens(), use_cache=False).logits
    checks = prune(str(source), tmp_path / "files", drop=dropped).checks
    assert checks[-1].startswith("Logits are those of the source")
    folders = [tmp_path / "files"]
    if model_type != "gemma3":  # which transformers loads whole, as tests/models/test_wrapped.py
        plan, state = plan_of(*dropped, n_layers=8), view.model.state_dict()
        patch = WeightPatch({"model.norm.weight": state["model.norm.weight"].clone()}, "test")
        apply(view, plan, patch)
        save(view, plan, patch, tmp_path / "memory")
        folders.append(tmp_path / "memory")
    before = load_file(source / "model.safetensors")
    for folder in folders:
        after = load_file(folder / "model.safetensors")
        rest = [name for name in before if not name.startswith(f"{view.layout.stored}.")]
        assert len(rest) > 10
        assert all(torch.equal(before[name], after[name]) for name in rest)
        config = json.loads((folder / "config.json").read_text())
        assert config["text_config"]["num_hidden_layers"] == 6
        assert (
            config["vision_config"]
            == json.loads((source / "config.json").read_text())["vision_config"]
        )
        assert config["text_config"].get("mtp_num_hidden_layers") == (
            1 if MTP.keys() & before else None
        )
        assert torch.equal(logits_of(folder, AutoModelForCausalLM), expected)
        assert torch.allclose(logits_of(folder, AutoModelForImageTextToText), expected, atol=1e-6)


def test_tensors_that_no_part_reads_are_surplus(tmp_path: Path) -> None:
    source = save_composite(tmp_path / "source", "llama4")
    change(source, {"vision_model.model.layers.9.mlp.fc1.weight": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"hold vision_model\.model\.layers\.9\.mlp\.fc1\.weight"):
        load(str(source), dtype="float32")


def test_two_lists_that_feed_one_decoder_are_refused(tmp_path: Path) -> None:
    source = save_composite(tmp_path / "source", "llama4")
    state = load_file(source / "model.safetensors")
    change(
        source,
        {
            name.removeprefix("language_model."): tensor.clone()
            for name, tensor in state.items()
            if name.startswith("language_model.model.layers.")
        },
    )
    with pytest.raises(ModelError, match=r"two lists of layers, .* both into the same decoder"):
        load(str(source), dtype="float32")


def test_weights_that_feed_no_layer_are_no_damage(tmp_path: Path) -> None:
    source = save_composite(tmp_path / "source", "llama4")
    state = load_file(source / "model.safetensors")
    renamed = {n.replace("language_model.", "thinker."): t for n, t in state.items()}
    save_file(renamed, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"hold 0 layers under .*where transformers' Llama4"):
        load(str(source), dtype="float32")


def test_a_tie_that_the_text_decoder_does_not_know_is_named(tmp_path: Path) -> None:
    source = save_composite(tmp_path / "source", "qwen3_5")
    text = json.loads((source / "config.json").read_text())["text_config"]
    edit_config(source, text_config=text | {"tie_word_embeddings": False})
    with pytest.raises(ModelError, match=r"lack lm_head\.weight: .* Set it in text_config too"):
        load(str(source), dtype="float32")


@pytest.mark.parametrize("model_type", ["qwen3_5", "llama4"])
def test_a_quantised_decoder_beside_plain_parts_is_pruned_by_files(
    tmp_path: Path, model_type: str
) -> None:
    source = save_composite(tmp_path / "source", model_type)
    state, ignore = load_file(source / "model.safetensors"), ["lm_head"]
    for name in [n for n in state if n.endswith("proj.weight") and state[n].dim() == 2]:
        module = name.removesuffix(".weight")
        if "language_model" not in name:
            ignore.append(module)
            continue
        weight = state.pop(name)
        state[f"{module}.weight_packed"] = torch.zeros(len(weight), 2, dtype=torch.int32)
        state[f"{module}.weight_scale"] = torch.rand(len(weight), 1)
    save_file(state, source / "model.safetensors", {"format": "pt"})
    own = "model.language_model.layers" if model_type == "qwen3_5" else "model.layers"
    lists = {"ignore": [*ignore, f"{own}.6.mlp.gate"], "quant_method": "compressed-tensors"}
    edit_config(source, quantization_config=lists)
    prune(str(source), tmp_path / "out", drop=[1, 4])
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["ignore"] == [*ignore, f"{own}.4.mlp.gate"]
    after = load_file(tmp_path / "out" / "model.safetensors")
    rest = [name for name in state if ".layers." not in name or "language_model" not in name]
    assert set(rest) <= after.keys()
    del state[next(n for n in state if n.endswith("norm.weight") and ".layers." not in n)]
    save_file(state, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks? .*norm"):
        prune(str(source), tmp_path / "again", drop=[1])
