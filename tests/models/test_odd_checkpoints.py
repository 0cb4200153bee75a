"""Checkpoints as people have them: other spellings, old tables, files that nobody expects."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import plan_of, save_tiny
from family_configs import FAMILIES, LATENT, ROUTED, SMALL, Family
from layercut.errors import ModelError
from layercut.models.check_method import check_model
from layercut.models.load import load
from layercut.models.surgery import apply
from layercut.output.save import save
from layercut.pipeline.inspect import inspect
from layercut.pipeline.prune_files import prune
from layercut.registry import resolve
from layercut.types import WeightPatch
from quantised_siblings import edit_config
from saved_families import pass_over, save_family, tokens

Tensors = dict[str, torch.Tensor]
DROPPED = (1, 4)


def change(folder: Path, edit: Callable[[Tensors], Tensors | None]) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(edit(state) or state, folder / "model.safetensors", metadata={"format": "pt"})


def prune_both_ways(source: Path, tmp_path: Path, dropped: tuple[int, ...] = DROPPED) -> Path:
    """By files and in memory: both run, and give the dense model's logits without these layers."""
    out = tmp_path / "out"
    assert prune(str(source), out, drop=dropped).checks[-1].startswith("Logits are those of")
    view, dense = (load(str(source), dtype="float32") for _ in range(2))
    plan = plan_of(*dropped, n_layers=view.n_layers)
    apply(view, plan)
    save(view, plan, WeightPatch({}, "none"), tmp_path / "saved")
    for layer in dropped:
        pass_over(dense.layers[layer])
    expected = dense.model(tokens(), use_cache=False).logits
    for folder in (out, tmp_path / "saved"):
        logits = load(str(folder), dtype="float32").model(tokens(), use_cache=False).logits
        assert torch.allclose(logits, expected, rtol=0, atol=1e-6)
    return out


def test_an_index_of_a_single_file_is_no_second_checkpoint(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    names = load_file(source / "model.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    out = prune_both_ways(source, tmp_path)
    written = json.loads((out / "model.safetensors.index.json").read_text())
    state = load_file(out / "model.safetensors")
    assert written["weight_map"].keys() == state.keys()
    assert written["metadata"]["total_size"] == sum(t.nbytes for t in state.values())


@pytest.mark.parametrize(
    ("name", "mask", "dtype"),
    [
        ("gpt_neox", "gpt_neox.layers.{}.attention.bias", torch.bool),
        ("gptj", "transformer.h.{}.attn.bias", torch.uint8),
        ("gpt2", "transformer.h.{}.attn.masked_bias", torch.float32),
    ],
)
def test_masks_that_old_checkpoints_store_move_with_their_layers(
    tmp_path: Path, name: str, mask: str, dtype: torch.dtype
) -> None:
    source = save_family(tmp_path / "source", FAMILIES[name])
    masks = {mask.format(i): torch.full((1, 1, 4, 4), i).to(dtype) for i in range(8)}
    change(source, lambda state: state | masks)
    assert inspect(str(source)).quantisation == ""
    state = load_file(prune_both_ways(source, tmp_path) / "model.safetensors")
    assert torch.equal(state[mask.format(4)], masks[mask.format(6)])
    assert mask.format(6) not in state


def test_float64_is_a_type_like_others(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    change(source, lambda s: {n: t.double() if "norm" in n else t for n, t in s.items()})
    state = load_file(prune_both_ways(source, tmp_path) / "model.safetensors")
    assert state["model.norm.weight"].dtype == torch.float64


def test_a_head_that_is_stored_beside_a_tied_embedding_stays_its_own(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", tie_word_embeddings=True)
    change(source, lambda s: s | {"lm_head.weight": s["model.embed_tokens.weight"] + 1})
    state = load_file(prune_both_ways(source, tmp_path) / "model.safetensors")
    assert not torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])


def test_the_number_of_layers_is_edited_in_every_spelling(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    edit_config(source, n_layer=6, num_layers=6, n_layers=12)
    config = json.loads((prune_both_ways(source, tmp_path) / "config.json").read_text())
    spellings = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    assert [config[key] for key in spellings] == [4, 4, 4, 12]


def test_lists_that_are_as_long_as_the_model_by_chance_stay(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    chance = {"suppress_tokens": [3, 4, 5, 6, 7, 8], "bad_words_ids": [[i] for i in range(6)]}
    edit_config(
        source, **chance, eos_token_id=[0, 1, 2, 3, 4, 5], unknown_scales=[0, 1, 2, 3, 4, 5]
    )
    config = json.loads((prune_both_ways(source, tmp_path) / "config.json").read_text())
    assert {key: config[key] for key in chance} == chance
    assert config["eos_token_id"] == [0, 1, 2, 3, 4, 5]
    assert config["unknown_scales"] == [0, 2, 3, 5]


def test_line_ends_of_a_configuration_stay(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    text = (source / "config.json").read_bytes()
    (source / "config.json").write_bytes(text.replace(b"\n", b"\r\n"))
    prune(str(source), tmp_path / "out", drop=[1])
    expected = text.replace(b"\n", b"\r\n").replace(b'layers": 6', b'layers": 5')
    assert (tmp_path / "out" / "config.json").read_bytes() == expected


def test_lists_of_types_may_go_on_behind_the_decoder(tmp_path: Path) -> None:
    settings = SMALL | ROUTED | LATENT | {"n_shared_experts": 1}
    types = ["dense", "sparse", "dense", "sparse", "sparse", "dense", "sparse", "dense"]
    family = Family("glm4_moe_lite", settings | {"mlp_layer_types": types})
    source = save_family(tmp_path / "source", family)
    edit_config(source, mlp_layer_types=[*types, "sparse"])
    config = json.loads((prune_both_ways(source, tmp_path) / "config.json").read_text())
    assert config["mlp_layer_types"] == [types[i] for i in (0, 2, 3, 5, 6, 7)]


def test_entries_of_mlx_quantisations_follow_their_layers(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")

    def pack(state: Tensors) -> Tensors:
        packed: Tensors = {}
        for name, tensor in state.items():
            packed[name] = tensor
            if "_proj.weight" in name:
                packed[name] = torch.zeros(tensor.shape[0], 2, dtype=torch.uint32)
                module = name.removesuffix(".weight")
                packed |= {f"{module}.{part}": tensor[:, :1] for part in ("scales", "biases")}
        return {name: tensor.contiguous() for name, tensor in packed.items()}

    change(source, pack)
    down = "model.layers.{}.mlp.down_proj"
    edit_config(
        source,
        quantization={"bits": 4, down.format(1): {"bits": 6}, down.format(5): {"bits": 8}},
    )
    prune(str(source), tmp_path / "out", drop=DROPPED)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"] == {"bits": 4, down.format(3): {"bits": 8}}


def test_the_last_layer_of_its_kind_takes_its_rotary_table_with_it(tmp_path: Path) -> None:
    types = ["sliding_attention"] * 5 + ["full_attention"]
    source = save_tiny(tmp_path / "source", "gemma3_text", layer_types=types, sliding_window=4)
    prune_both_ways(source, tmp_path, dropped=(5,))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "gpt2 inverse"])
def test_layers_are_run_one_by_one_whatever_their_names_on_disk(tmp_path: Path, name: str) -> None:
    source = save_family(tmp_path / "source", FAMILIES[name])
    if name == "gpt2 inverse":
        change(source, lambda s: {n.removeprefix("transformer."): t for n, t in s.items()})
    prune_both_ways(source, tmp_path)


def test_decoders_made_of_bert_layers_are_decoders(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "bert", is_decoder=True)
    view = load(str(source), dtype="float32")
    assert (view.layout.layers, type(view.decoder).__name__) == ("bert.encoder.layer", "BertModel")
    prune_both_ways(source, tmp_path)


def test_layers_whose_selection_others_reuse_must_stay(tmp_path: Path) -> None:
    types = ["full", "full", "shared", "full", "full", "shared", "shared", "full"]
    settings = {"n_shared_experts": 1, "indexer_types": types, "index_n_heads": 2, "index_topk": 64}
    settings |= {"index_head_dim": 8, "hidden_size": 32, "mlp_layer_types": ["dense"] * 8}
    family = Family("glm_moe_dsa", SMALL | ROUTED | LATENT | settings)
    source = save_family(tmp_path / "source", family)
    view = load(str(source), dtype="float32")
    assert set(view.layout.pinned) == {1, 4}
    with pytest.raises(ModelError, match="layer 4 cannot be dropped: later layers attend to the"):
        prune(str(source), tmp_path / "out", drop=[4])
    with pytest.raises(ModelError, match="reuse what earlier ones compute"):
        check_model(resolve("scoring", "gradmap"), view)
    prune_both_ways(source, tmp_path, dropped=(0, 3, 5))
