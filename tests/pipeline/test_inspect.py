from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conftest import save_tiny
from layercut.cli import main
from layercut.errors import ModelError
from layercut.models.load import load
from layercut.pipeline.inspect import NEEDS_PREVIOUS, inspect
from quantised_siblings import edit_config, quantised

WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}


def test_figures_are_those_of_the_loaded_model(tiny_llama: Path) -> None:
    found, view = inspect(str(tiny_llama)), load(str(tiny_llama))
    assert (found.n_layers, found.n_parameters) == (view.n_layers, view.n_parameters)
    # q, o: 16 x 16; k, v: 8 x 16; three of 32 x 16; two norms of 16.
    assert {layer.n_parameters for layer in found.layers} == {2 * 256 + 2 * 128 + 3 * 512 + 32}
    assert (found.model_type, found.architecture) == ("llama", "LlamaForCausalLM")
    assert (found.tied, found.context, found.quantisation) == (False, 128, "")
    assert found.stored == {"F32": 4 * found.n_parameters}
    assert found.refusal == ""
    assert [i for i, layer in enumerate(found.layers) if layer.pinned == NEEDS_PREVIOUS] == [0]
    assert found.scoring["memory_bytes"] > 4 * found.n_parameters
    assert found.scoring["seconds"] > 0


def test_tied_heads_are_counted_once(tmp_path: Path) -> None:
    source = save_tiny(tmp_path, "qwen2", tie_word_embeddings=True, **WINDOWS)
    found = inspect(str(source))
    assert found.tied
    assert found.n_parameters == load(str(source)).n_parameters
    assert [e.kind for e in found.layers] == ["full_attention"] * 3 + ["sliding_attention"] * 3


def test_nothing_but_headers_is_read(tiny_llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    weights = source / "model.safetensors"
    content = bytearray(weights.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = b"\xff" * (len(content) - start)  # NaN throughout, which loading refuses
    weights.write_bytes(content)
    assert inspect(str(source)).refusal == ""


def test_quantised_models_are_for_plans(tiny_llama: Path, tmp_path: Path) -> None:
    source = quantised(tiny_llama, tmp_path / "source", "awq")
    found = inspect(str(source))
    assert found.quantisation == "awq"
    assert found.n_parameters == inspect(str(tiny_llama)).n_parameters
    assert "quantised" in found.refusal
    assert found.by_plan
    assert found.scoring == {}


def test_models_that_cannot_be_pruned_are_described_with_the_reason(
    tiny_llama: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    edit_config(source, auto_map={"AutoModel": "code.Model"})
    found = inspect(str(source))
    assert "own code" in found.refusal
    assert not found.by_plan
    assert (found.n_layers, found.layers) == (6, ())


def test_damaged_checkpoints_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        inspect(str(tmp_path))


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_tiny(tmp_path / "source", "qwen2", **WINDOWS)
    assert main(["inspect", str(source), "--json", str(tmp_path / "i.json")]) == 0
    shown = capsys.readouterr().out
    assert "qwen2 (Qwen2ForCausalLM)" in shown
    assert "  0-2 " in shown
    assert "sliding_attention" in shown
    assert "layer 0: the default recovery needs a kept layer" in shown
    content = json.loads((tmp_path / "i.json").read_text())
    assert (content["schema"], content["prunable"], len(content["layers"])) == (1, True, 6)
    assert content["layers"][5]["type"] == "sliding_attention"
    quantised(source, tmp_path / "awq", "awq")
    assert main(["inspect", str(tmp_path / "awq")]) == 0
    shown = capsys.readouterr().out
    assert "no: the model of" in shown
    assert "`layercut prune` can apply a plan to it." in shown
