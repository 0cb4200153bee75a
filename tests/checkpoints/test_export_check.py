from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, Gemma3Config

from layercut.checkpoints.export_check import export_check
from layercut.checkpoints.export_rules import LLAMA_CPP, MLX, OLD_READERS, RULES
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


S, F, L = "sliding_attention", "full_attention", "linear_attention"
ALL = "llama.cpp, vLLM, SGLang and mlx-lm"
SLID = [S, F, S, F]
RULE_CASES: list[tuple[str, str, dict, dict]] = [
    # engine, model type, what is right for it, what breaks it
    (LLAMA_CPP, "gemma2", {"layer_types": SLID}, {"layer_types": [F, S, F, S]}),
    (LLAMA_CPP, "gpt_oss", {"layer_types": SLID}, {"layer_types": [F, S, F, S]}),
    (LLAMA_CPP, "gemma3_text", {"layer_types": [S, S, S, S]}, {"layer_types": [S, S, S, F]}),
    (
        LLAMA_CPP,
        "gemma3n_text",
        {"num_hidden_layers": 30, "num_kv_shared_layers": 10},
        {"num_hidden_layers": 30, "num_kv_shared_layers": 10, "layer_types": [*[S] * 29, F]},
    ),
    (
        LLAMA_CPP,
        "gemma3n_text",
        {"num_hidden_layers": 35, "num_kv_shared_layers": 15},
        {"num_hidden_layers": 30, "num_kv_shared_layers": 15},
    ),
    (
        LLAMA_CPP,
        "gemma3n_text",
        {"num_hidden_layers": 30, "num_kv_shared_layers": 10},
        {
            "num_hidden_layers": 30,
            "num_kv_shared_layers": 10,
            "activation_sparsity_pattern": [0.95] * 9 + [0.0] * 21,
        },
    ),
    *(
        (LLAMA_CPP, family, {"layer_types": [S, S, S, F]}, {"layer_types": [S, S, F, S]})
        for family in ("cohere2", "olmo3", "afmoe", "exaone_moe")
    ),
    (LLAMA_CPP, "smollm3", {"no_rope_layers": [1, 1, 1, 0]}, {"no_rope_layers": [1, 1, 0, 1]}),
    (LLAMA_CPP, "llama4_text", {"no_rope_layers": [1, 1, 1, 0]}, {"no_rope_layers": [1, 0, 1, 1]}),
    (
        LLAMA_CPP,
        "exaone4",
        {"num_hidden_layers": 64, "layer_types": [S, S, S, F] * 16},
        {"num_hidden_layers": 60, "layer_types": [S, S, S, F] * 15},
    ),
    (
        LLAMA_CPP,
        "exaone4",
        {"num_hidden_layers": 30, "layer_types": [F] * 30, "sliding_window": None},
        {"num_hidden_layers": 64, "layer_types": [F] * 64, "sliding_window": None},
    ),
    (
        LLAMA_CPP,
        "deepseek_v2",
        {"num_hidden_layers": 27, "q_lora_rank": None},
        {"num_hidden_layers": 22, "q_lora_rank": None},
    ),
    (
        LLAMA_CPP,
        "deepseek_v2",
        {"num_hidden_layers": 48, "q_lora_rank": None, "vocab_size": 128_256},
        {"num_hidden_layers": 26, "q_lora_rank": 512},
    ),
    *(
        (
            engine,
            family,
            {"layer_types": [L, L, F, L], "full_attention_interval": 3},
            {"layer_types": [L, L, F, L], "full_attention_interval": 4},
        )
        for engine in (LLAMA_CPP, "SGLang and mlx-lm")
        for family in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
    ),
    *(
        (
            engine,
            "llama4_text",
            {"moe_layers": [1, 3], "interleave_moe_layer_step": 2},
            {"moe_layers": [0, 2], "interleave_moe_layer_step": 2},
        )
        for engine in (LLAMA_CPP, "vLLM and SGLang")
    ),
    (LLAMA_CPP, "ernie4_5_moe", {"moe_layer_end_index": 3}, {"moe_layer_end_index": 2}),
    (
        LLAMA_CPP,
        "gemma2",
        {"query_pre_attn_scalar": 256, "head_dim": 256},
        {"query_pre_attn_scalar": 224, "head_dim": 256},
    ),
    (LLAMA_CPP, "qwen3", {}, {"layer_types": [F, F, F, S], **SLIDING}),
    (
        LLAMA_CPP,
        "deepseek_v3",
        {"num_nextn_predict_layers": 0},
        {"num_nextn_predict_layers": 1},
    ),
    (
        ALL,
        "glm_moe_dsa",
        {"first_k_dense_replace": 1, "mlp_layer_types": ["dense", *["sparse"] * 3]},
        {"first_k_dense_replace": 2, "mlp_layer_types": ["dense", *["sparse"] * 3]},
    ),
    (
        ALL,
        "axk1",
        {"mlp_layer_types": ["dense", "dense", "sparse", "sparse"]},
        {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]},
    ),
    (
        "vLLM, SGLang and mlx-lm",
        "bailing_hybrid",
        {"layer_group_size": 2, "layer_types": [L, F, L, F]},
        {"layer_group_size": 3, "layer_types": [L, L, F, L]},
    ),
    (
        ALL,
        "kimi_linear",
        {"layer_types": [L, L, L, F], "linear_attn_config": {"full_attn_layers": [4]}},
        {"layer_types": [L, L, F, L], "linear_attn_config": {"full_attn_layers": [4]}},
    ),
    ("vLLM", "gpt_oss", {"layer_types": SLID}, {"layer_types": [F, S, F, S]}),
    ("vLLM", "qwen3_moe", {}, {"layer_types": [F, F, F, S], **SLIDING}),
    (
        "vLLM",
        "qwen2",
        {"max_window_layers": 4, **SLIDING},
        {"max_window_layers": 3, **SLIDING},
    ),
    *(
        (
            MLX,
            family,
            {"layer_types": [S, S, F, S], "sliding_window_pattern": 3},
            {"layer_types": [S, S, F, S], "sliding_window_pattern": 4},
        )
        for family in ("gemma3_text", "cohere2")
    ),
    (
        MLX,
        "exaone4",
        {"layer_types": [S, S, F, F], "sliding_window_pattern": "LLG"},
        {"layer_types": [S, S, F, S], "sliding_window_pattern": "LLG"},
    ),
    (MLX, "llama4_text", {"no_rope_layers": [1, 1, 1, 0]}, {"no_rope_layers": [1, 0, 1, 1]}),
    (OLD_READERS, "olmo3", {"layer_types": [S, S, S, F]}, {"layer_types": [S, F, S, S]}),
    (
        f"{OLD_READERS} and mlx-lm",
        "llama",
        {"rope_parameters": ROPE},
        {"rope_parameters": ROPE | {"rope_theta": 5e5}},
    ),
    (
        "vLLM, llama.cpp and Ollama",
        "gpt2",
        {},
        {"scale_attn_by_inverse_layer_idx": True},
    ),
]


def plain(folder: Path, model_type: str, settings: dict) -> Path:
    """A config.json that spells a few keys only, as people write them."""
    content = {"model_type": model_type, "num_hidden_layers": 4} | settings
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(("engine", "family", "right", "wrong"), RULE_CASES)
def test_each_rule_finds_what_breaks_it_and_nothing_else(
    tmp_path: Path, engine: str, family: str, right: dict, wrong: dict
) -> None:
    before = [f for f in export_check(plain(tmp_path, family, right)) if f.engine == engine]
    after = [f for f in export_check(plain(tmp_path, family, wrong)) if f.engine == engine]
    assert len(before) == 0
    assert after
    rules = {
        (rule.engine, rule.why): rule for rule in RULES if family in (rule.families or {family})
    }
    assert all(rules[f.engine, f.why].source == f.source for f in after)


def test_every_rule_has_a_case_and_a_source(tmp_path: Path) -> None:
    found = {
        (finding.engine, finding.why)
        for _, family, _, wrong in RULE_CASES
        for finding in export_check(plain(tmp_path, family, wrong))
    }
    assert found == {(rule.engine, rule.why) for rule in RULES}
    page = (Path(__file__).parents[2] / "docs" / "engines_and_export.md").read_text()
    assert all(f"| {rule.why} | {rule.source} |" in page for rule in RULES)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "phi3", "gpt2", "gemma"])
def test_alike_layers_run_everywhere_whatever_their_number(tmp_path: Path, model_type: str) -> None:
    # Engines print a size for some numbers of layers (26, 27, 46, 48, 62, 64), and do no more.
    for n_layers in (1, 5, 26, 27, 46, 48, 62, 64):
        assert engines(plain(tmp_path, model_type, {"num_hidden_layers": n_layers})) == []


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2"])
def test_alike_layers_run_everywhere(tmp_path: Path, model_type: str) -> None:
    assert engines(write(tmp_path, of(model_type), rope_parameters=ROPE)) == []


@pytest.mark.parametrize(
    ("model_type", "wrong"),
    [
        ("gemma2", [LLAMA_CPP, OLD_READERS]),
        ("gemma3_text", [LLAMA_CPP, MLX, OLD_READERS]),
        ("gpt_oss", [LLAMA_CPP, "vLLM", OLD_READERS]),
        ("smollm3", [LLAMA_CPP, OLD_READERS]),
        ("cohere2", [LLAMA_CPP, MLX, OLD_READERS]),
        ("olmo3", [LLAMA_CPP, OLD_READERS]),
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
    assert engines(folder) == [LLAMA_CPP, MLX, OLD_READERS]


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


def test_only_the_list_is_judged_where_transformers_stumbles_over_deriving_it(
    tmp_path: Path,
) -> None:
    # EXAONE 4 as published gives a pattern word, which transformers 5 cannot count with.
    settings = {"num_hidden_layers": 8, "layer_types": [S, S, S, F] * 2, "sliding_window": 4096}
    folder = plain(tmp_path, "exaone4", settings | {"sliding_window_pattern": "LLLG"})
    assert engines(folder) == [LLAMA_CPP]


def test_configurations_that_cannot_be_judged_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        export_check(tmp_path)
    with pytest.raises(ModelError, match="nowhere does not exist"):
        export_check(tmp_path / "nowhere")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="is a GGUF file"):
        export_check(tmp_path / "model.gguf")
    (tmp_path / "config.json").write_text('{"model_type": ["llama"]}')
    with pytest.raises(ModelError, match=r"does not know the model type \['llama'\]"):
        export_check(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(ModelError, match="'resnet' has no stack"):
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
