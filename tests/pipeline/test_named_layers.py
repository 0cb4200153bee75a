"""Names of layers in files beside the weights, and folders that are not what they seem."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from conftest import save_tiny
from family_configs import FAMILIES
from layercut.checkpoints.safetensors_file import read_shard
from layercut.errors import ModelError
from layercut.models.load import load
from layercut.pipeline.inspect import inspect
from layercut.pipeline.prune_files import prune
from quantised_siblings import edit_config, quantised
from saved_families import save_family

MIXED = {r"+:model\.layers\.3\.self_attn\.q_proj": {"bits": 16}}


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2))


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture
def source(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "source"))


def test_files_beside_that_name_layers_are_renumbered(source: Path, tmp_path: Path) -> None:
    described = {
        "model.layers.0.mlp.up_proj.weight": "W8",
        "model.layers.4.mlp.up_proj.weight": "F",
    }
    write_json(source / "quant_model_description.json", {"version": "1", **described})
    write_json(source / "trainer_state.json", {"loss": [1.0, 0.5]})
    write_json(source / "pytorch_model.bin.index.json", {"weight_map": described})
    write_json(source / "list.json", ["model.layers.4"])
    prune(str(source), tmp_path / "out", drop=[0, 3])
    assert read(tmp_path / "out" / "quant_model_description.json") == {
        "version": "1",
        "model.layers.2.mlp.up_proj.weight": "F",
    }
    for name in ("trainer_state.json", "pytorch_model.bin.index.json", "list.json"):
        assert not (tmp_path / "out" / name).exists()


def test_a_file_beside_that_names_unknown_layers_is_refused(source: Path, tmp_path: Path) -> None:
    write_json(source / "draft_config.json", {"target": "draft.layers.4.mlp"})
    with pytest.raises(ModelError, match=r"draft_config.json: 'draft\.layers\.4\.mlp' looks like"):
        prune(str(source), tmp_path / "out", drop=[0])
    assert not (tmp_path / "out").exists()


def test_metadata_in_the_files_headers_follows(source: Path, tmp_path: Path) -> None:
    inner = json.dumps({"layers": {"model.layers.4.mlp.up_proj": {"format": "x"}}})
    state = load_file(source / "model.safetensors")
    save_file(
        state, source / "model.safetensors", {"format": "pt", "_quantization_metadata": inner}
    )
    prune(str(source), tmp_path / "out", drop=[0, 3])
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "_quantization_metadata": inner.replace("layers.4", "layers.2"),
        }


def test_metadata_that_is_no_text_is_damage(tmp_path: Path) -> None:
    header = b'{"__metadata__":{"format":1}}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError, match="damaged or truncated: its header does not follow"):
        read_shard(path)


@pytest.mark.parametrize(("key", "value"), [("assistant_early_exit", 4), ("dola_layers", [2, 4])])
def test_generation_settings_that_count_layers_are_refused(
    source: Path, tmp_path: Path, key: str, value: object
) -> None:
    settings = read(source / "generation_config.json") | {key: value}
    write_json(source / "generation_config.json", settings)
    with pytest.raises(ModelError, match=rf"sets {key} = .*Remove that key"):
        prune(str(source), tmp_path / "out", drop=[0])


def test_names_at_any_depth_of_the_configuration_follow(source: Path, tmp_path: Path) -> None:
    edit_config(source, notes={"kept": [{"in": "model.layers.4.mlp"}]}, keep_fp32=["layers.5.mlp"])
    prune(str(source), tmp_path / "out", drop=[0, 3])
    config = read(tmp_path / "out" / "config.json")
    assert config["notes"] == {"kept": [{"in": "model.layers.2.mlp"}]}
    assert config["keep_fp32"] == ["layers.3.mlp"]


def lose_scales(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["model.layers.3.self_attn.q_proj.scales"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_a_layer_that_the_quantisation_sets_apart_is_no_damage(
    tiny_llama: Path, tmp_path: Path
) -> None:
    source = quantised(tiny_llama, tmp_path / "source", "gptq")
    lose_scales(source)
    with pytest.raises(ModelError, match="q_proj: scales, and nothing in the quantisation's"):
        prune(str(source), tmp_path / "out", drop=[1])
    quantisation = read(source / "config.json")["quantization_config"]
    edit_config(source, quantization_config=quantisation | {"dynamic": MIXED})
    prune(str(source), tmp_path / "out", drop=[1])
    dynamic = read(tmp_path / "out" / "config.json")["quantization_config"]["dynamic"]
    assert dynamic == {r"+:model\.layers\.2\.self_attn\.q_proj": {"bits": 16}}


@pytest.mark.parametrize("tried", [load, inspect, lambda m: prune(m, f"{m}-out", drop=[1])])
def test_a_folder_of_an_adapter_alone_says_how_to_merge_it(tmp_path: Path, tried: object) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_json(folder / "adapter_config.json", {"base_model_name_or_path": "org/base"})
    save_file(
        {"base_model.model.x.lora_A.weight": torch.zeros(1)}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(
        ModelError, match=r"Merge it into org/base first.*merge_and_unload"
    ) as caught:
        tried(str(folder))  # type: ignore[operator]
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["deepseek_v3", "falcon"])
def test_code_of_families_that_are_built_in_now_is_not_needed(tmp_path: Path, name: str) -> None:
    source = save_family(tmp_path / "source", FAMILIES[name])
    kind = {"deepseek_v3": "DeepseekV3", "falcon": "Falcon"}[name]
    auto_map = {
        "AutoConfig": f"configuration.{kind}Config",
        "AutoModel": f"org/model--modeling.{kind}Model",
        "AutoModelForCausalLM": f"modeling.{kind}ForCausalLM",
    }
    edit_config(source, auto_map=auto_map)
    with pytest.warns(UserWarning, match=f"names code of its own .*built-in '{name}'"):
        load(str(source), dtype="float32")
    result = prune(str(source), tmp_path / "out", drop=[1, 4])
    assert any("code of its own" in text for text in result.warnings)
    written = read(tmp_path / "out" / "config.json")
    assert "auto_map" not in written
    assert AutoConfig.from_pretrained(tmp_path / "out").num_hidden_layers == 6


@pytest.mark.parametrize(
    "auto_map",
    [
        {"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"},
        {"AutoConfig": "configuration_other.OtherConfig"},
    ],
)
def test_other_code_for_a_built_in_type_is_another_model(
    source: Path, auto_map: dict[str, str]
) -> None:
    edit_config(source, auto_map=auto_map)
    with pytest.raises(ModelError, match="needs its own code"):
        load(str(source))


def test_the_first_key_of_a_configuration_can_go(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    config = read(source / "config.json")
    auto_map = {"AutoModelForCausalLM": "m.LlamaForCausalLM"}
    write_json(source / "config.json", {"auto_map": auto_map} | config)
    prune(str(source), tmp_path / "out", drop=[1])
    assert read(tmp_path / "out" / "config.json") == config | {"num_hidden_layers": 5}
