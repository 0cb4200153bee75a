from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, Gemma3Config

from layercut.checkpoints.export_check import (
    CONDITIONS,
    LLAMA_CPP,
    OLD_READERS,
    RULES,
    export_check,
)
from layercut.cli import main
from layercut.errors import ModelError

ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 4096}


def write(folder: Path, config: Any, **changes: Any) -> Path:
    content = json.loads(config.to_json_string(use_diff=False)) | changes
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def of(model_type: str, **settings: Any) -> Any:
    return AutoConfig.for_model(model_type, **settings)


def engines(folder: Path) -> list[str]:
    return [finding.engine for finding in export_check(folder)]


def shifted(model_type: str, n_layers: int = 12, **settings: Any) -> Any:
    """The configuration after layer 0 was dropped."""
    whole = of(model_type, num_hidden_layers=n_layers, **settings)
    kept = {k: v[1:] for k in ("layer_types", "no_rope_layers") if (v := getattr(whole, k, None))}
    return of(model_type, num_hidden_layers=n_layers - 1, **kept, **settings)


def test_every_condition_is_used_and_known() -> None:
    assert {rule.condition for rule in RULES} == CONDITIONS.keys()


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2"])
def test_alike_layers_run_everywhere(tmp_path: Path, model_type: str) -> None:
    assert engines(write(tmp_path, of(model_type), rope_parameters=ROPE)) == []


@pytest.mark.parametrize(
    ("model_type", "wrong"),
    [
        ("gemma2", [LLAMA_CPP, OLD_READERS]),
        ("gemma3_text", [LLAMA_CPP, OLD_READERS]),
        ("gpt_oss", [LLAMA_CPP, "vLLM", OLD_READERS]),
        ("smollm3", [LLAMA_CPP, OLD_READERS]),
        ("cohere2", [LLAMA_CPP, OLD_READERS]),
        ("olmo3", [OLD_READERS]),
    ],
)
def test_shifted_patterns_are_found(tmp_path: Path, model_type: str, wrong: list[str]) -> None:
    folder = write(tmp_path, of(model_type, num_hidden_layers=12), rope_parameters=ROPE)
    assert engines(folder) == []
    assert engines(write(tmp_path, shifted(model_type), rope_parameters=ROPE)) == wrong


def test_whole_periods_stay_portable(tmp_path: Path) -> None:
    types = of("gemma3_text", num_hidden_layers=18).layer_types
    config = of("gemma3_text", num_hidden_layers=12, layer_types=types[:3] + types[9:])
    assert engines(write(tmp_path, config, rope_parameters=ROPE)) == []


def test_the_text_part_of_a_multimodal_model_is_judged(tmp_path: Path) -> None:
    folder = write(tmp_path, Gemma3Config(text_config=shifted("gemma3_text").to_dict()))
    content = json.loads((folder / "config.json").read_text())
    content["text_config"]["rope_parameters"] = ROPE
    (folder / "config.json").write_text(json.dumps(content))
    assert engines(folder) == [LLAMA_CPP, OLD_READERS]


@pytest.mark.parametrize(
    ("n_layers", "scalar", "wrong"),
    [(46, 144, []), (40, 144, [LLAMA_CPP]), (40, 128, []), (46, 128, [LLAMA_CPP])],
)
def test_scales_by_the_number_of_layers(
    tmp_path: Path, n_layers: int, scalar: int, wrong: list[str]
) -> None:
    # Gemma 2 27B: 4608 / 32 heads = 144, but heads of 128.
    size = {"hidden_size": 4608, "num_attention_heads": 32, "head_dim": 128}
    config = of("gemma2", num_hidden_layers=n_layers, query_pre_attn_scalar=scalar, **size)
    assert engines(write(tmp_path, config, rope_parameters=ROPE)) == wrong


def test_sliding_layers_that_engines_do_not_read(tmp_path: Path) -> None:
    config = of("qwen3", num_hidden_layers=6, max_window_layers=3, **SLIDING)
    assert engines(write(tmp_path, config, rope_parameters=ROPE)) == [LLAMA_CPP, "vLLM"]
    config = of("qwen2", num_hidden_layers=6, max_window_layers=3, **SLIDING)
    assert engines(write(tmp_path, config, rope_parameters=ROPE)) == [LLAMA_CPP, "vLLM"]
    config = of("qwen2", num_hidden_layers=6, max_window_layers=6, **SLIDING)
    assert engines(write(tmp_path, config, rope_parameters=ROPE)) == []


def test_counts_of_prediction_layers_and_shared_ones(tmp_path: Path) -> None:
    config = of("deepseek_v3", num_hidden_layers=8)
    found = engines(write(tmp_path, config, num_nextn_predict_layers=1, rope_parameters=ROPE))
    assert found == [LLAMA_CPP]
    config = of("gemma3n_text", num_hidden_layers=30, num_kv_shared_layers=15)
    found = engines(write(tmp_path, config, rope_parameters=ROPE))
    assert found == [LLAMA_CPP]
    config = of("gpt2", scale_attn_by_inverse_layer_idx=True)
    assert engines(write(tmp_path, config)) == ["vLLM, llama.cpp and Ollama"]


def test_rotary_bases_that_older_readers_miss(tmp_path: Path) -> None:
    theta = ROPE | {"rope_theta": 500_000.0}
    folder = write(tmp_path, of("llama"), rope_parameters=theta)
    (finding,) = export_check(folder)
    assert finding.engine == f"{OLD_READERS} and mlx-lm"
    assert "rope_theta" in finding.remedy
    assert engines(write(tmp_path, of("llama"), rope_parameters=theta, rope_theta=5e5)) == []


@pytest.mark.parametrize(
    ("inside", "beside"),
    [
        (
            {"rope_type": "linear", "factor": 2.0},
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
        ),
        ({"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 0.5}),
    ],
)
def test_scalings_and_partial_rotations_that_older_readers_miss(
    tmp_path: Path, inside: dict, beside: dict
) -> None:
    config = of("llama")
    found = engines(write(tmp_path, config, rope_parameters=ROPE | inside, rope_theta=1e4))
    assert found == ["transformers v4 and mlx-lm"]
    assert engines(write(tmp_path, config, rope_parameters=ROPE | inside, **beside)) == []


def test_configurations_that_cannot_be_judged_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        export_check(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nope"}')
    with pytest.raises(ModelError, match="does not know the model type 'nope'"):
        export_check(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}')
    with pytest.raises(ModelError, match="does not describe a model"):
        export_check(tmp_path)


def test_the_command_needs_no_weights_and_exits_6_on_findings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path, shifted("gemma2"), rope_parameters=ROPE)
    assert main(["export-check", str(folder), "--json", str(tmp_path / "found.json")]) == 6
    shown = capsys.readouterr()
    assert "every second layer is taken to slide" in shown.out
    assert "preserve_pattern" in shown.out
    assert f"would be mis-run by {LLAMA_CPP}, {OLD_READERS}" in shown.err
    assert len(json.loads((tmp_path / "found.json").read_text())["findings"]) == 2
    write(tmp_path, of("llama"), rope_parameters=ROPE)
    assert main(["export-check", str(folder)]) == 0
    assert "no engine is known to mis-run" in capsys.readouterr().out
