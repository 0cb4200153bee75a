"""The whole flow: on a tiny model for what can break, on the embedded one for what is real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import layercut
from conftest import save_tiny
from layercut.errors import LayercutError, NumericsError, OutputError, PlanError, RecipeError

TEXT = "The quick brown fox jumps over the lazy dog. " * 200


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path) -> dict:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    return {
        "model": str(tiny_llama),
        "calibration": {"data": str(text), "n_sequences": 4, "seq_len": 32, "gradient_batch": 2},
        "scoring": {"method": "gradmap"},
        "selection": {"strategy": "lowest", "rounds": "each", "drop_layers": 2},
        "recovery": {"method": "projection"},
        "evaluation": {"text": {"fox": str(text)}, "seq_len": 64, "max_tokens": 256},
    }


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_output_is_a_checkpoint_that_plain_transformers_loads(recipe: dict, tmp_path: Path):
    result = layercut.run(recipe, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
    assert model.config.num_hidden_layers == 4
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("fox", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 7)
    assert result.stages["pruned"].n_layers == 4
    assert result.stages["pruned"].n_parameters == sum(p.numel() for p in model.parameters())


def test_output_holds_the_files_of_the_interface(recipe: dict, tmp_path: Path):
    layercut.run(recipe, tmp_path / "out")
    out = tmp_path / "out"
    names = {"recipe.yaml", "scores.json", "plan.json", "result.json", "report.html"}
    assert {path.name for path in (out / "layercut").iterdir()} == names
    assert (out / "README.md").read_text().startswith("---\n")
    result = json.loads((out / "layercut/result.json").read_text())
    assert result["schema"] == 2
    assert set(result["stages"]) == {"dense", "pruned"}
    assert set(result["stages"]["dense"]["perplexity"]["fox"]) == {"value", "stderr", "n_tokens"}
    dense, pruned = result["stages"]["dense"], result["stages"]["pruned"]
    for name, spread in (("prefill", "prefill_spread"), ("decode", "decode_spread")):
        low, high = dense[spread]
        assert low <= dense[f"{name}_tokens_per_second"] <= high
        assert set(pruned["speed_change"][name]) == {"value", "spread", "n_rounds"}
    assert "speed_change" not in dense
    assert pruned["weight_bytes"] < dense["weight_bytes"]
    assert {"load", "score", "recover", "save", "evaluate", "total"} <= set(result["seconds"])
    plan = json.loads((out / "layercut/plan.json").read_text())
    scores = json.loads((out / "layercut/scores.json").read_text())
    assert plan["fingerprint"] == scores["fingerprint"]
    assert len(plan["dropped"]) == 2
    assert sorted(plan["dropped"] + plan["kept"]) == list(range(6))
    assert len(plan["rounds"]) == 2


def test_the_reported_perplexity_is_that_of_the_written_files(recipe: dict, tmp_path: Path):
    recipe["dtype"] = "float32"
    result = layercut.run(recipe, tmp_path / "out")
    view = layercut.load(str(tmp_path / "out"), dtype="float32")
    measured = layercut.evaluate(view, **recipe["evaluation"], speed=False)
    assert measured.perplexity["fox"] == result.stages["pruned"].perplexity["fox"]


def test_two_runs_write_the_same_weights_and_the_resolved_recipe_reproduces_them(
    recipe: dict, tmp_path: Path
):
    layercut.run(recipe, tmp_path / "a")
    layercut.run(tmp_path / "a/layercut/recipe.yaml", tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_pruned_model_can_be_pruned_again(recipe: dict, tmp_path: Path):
    layercut.run(recipe, tmp_path / "once")
    recipe |= {
        "model": str(tmp_path / "once"),
        "selection": {"strategy": "lowest", "drop_layers": 1},
    }
    result = layercut.run(recipe, tmp_path / "twice")
    assert result.stages["pruned"].n_layers == 3


def test_a_perplexity_budget_drops_as_many_layers_as_it_allows(recipe: dict, tmp_path: Path):
    recipe["selection"] = {"strategy": "lowest", "max_perplexity_ratio": 1000.0}
    result = layercut.run(recipe, tmp_path / "out")
    assert result.stages["pruned"].n_layers == 2
    content = json.loads((tmp_path / "out/layercut/result.json").read_text())
    assert content["plan"]["trials"]["4"] <= 1000
    assert content["recipe"]["selection"]["drop_layers"] is None


def test_python_api_step_by_step_equals_run(recipe: dict, tmp_path: Path):
    layercut.run(recipe, tmp_path / "run")
    view = layercut.load(recipe["model"])
    batches = layercut.calibration_batches(recipe["calibration"], view.tokenizer)
    plan, evidence = layercut.select(
        view, batches, strategy="lowest", scoring="gradmap", rounds="each", drop_layers=2
    )
    patch = layercut.fit(view, plan, evidence, batches, method="projection")
    layercut.apply(view, plan, patch)
    layercut.save(view, plan, patch, tmp_path / "api")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "api")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_checkpoints_stay_narrow_and_verify(recipe: dict, tmp_path: Path, dtype):
    folder = save_tiny(tmp_path / "narrow")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.save_pretrained(folder)
    recipe |= {"model": str(folder), "dtype": "float32"}
    layercut.run(recipe, tmp_path / "out")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert written.dtype == dtype


def test_the_default_methods_run_end_to_end(recipe: dict, tmp_path: Path):
    for section in ("scoring", "recovery"):
        del recipe[section]
    recipe["selection"] = {"drop_layers": 2}
    result = layercut.run(recipe, tmp_path / "out")
    assert result.plan is not None
    assert result.plan.method == "priced-cuts"
    assert 0 not in result.plan.dropped
    assert result.recovery["method"] == "refit"
    content = json.loads((tmp_path / "out/layercut/plan.json").read_text())
    assert content["curve"]["1"] > 0


def test_refit_protects_layer_0_and_refuses_to_lose_it(recipe: dict, tmp_path: Path):
    recipe |= {"scoring": {"method": "reverse-order"}, "recovery": {"method": "refit"}}
    recipe["selection"] = {"strategy": "lowest", "drop": [0, 2]}
    with pytest.raises(PlanError, match=r"selection\.drop names layer 0"):
        layercut.run(recipe, tmp_path / "out")


def test_warnings_become_sentences_of_the_result(recipe: dict, tmp_path: Path):
    recipe["calibration"]["n_sequences"] = 1000
    result = layercut.run(recipe, tmp_path / "out")
    assert any("fewer than the 1000" in sentence for sentence in result.warnings)
    content = json.loads((tmp_path / "out/layercut/result.json").read_text())
    assert content["warnings"] == result.warnings


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"selection": {"strategy": "lowest", "drop_layers": 6}}, PlanError, "cannot drop 6 of 6"),
        ({"selection": {"strategy": "lowest", "drop": [6]}}, PlanError, "names layer 6"),
        ({"selection": {"strategy": "priced-cuts"}}, RecipeError, "priced-cuts needs scoring.meth"),
        ({"recovery": {"method": "projektion"}}, RecipeError, "did you mean 'projection'"),
        ({"recovery": {"method": "ghost"}}, RecipeError, "'ghost' adds an operation at run time"),
        ({"scoring": {"options": {"norm": "l7"}}}, RecipeError, "scoring.options.norm"),
    ],
)
def test_mistakes_are_refused_and_leave_nothing(
    recipe: dict, tmp_path: Path, change: dict, error: type[LayercutError], message: str
):
    with pytest.raises(error, match=message):
        layercut.run(recipe | change, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.txt"]


def test_non_finite_weights_are_refused_by_name(recipe: dict, tmp_path: Path):
    folder = save_tiny(tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("inf")
    model.save_pretrained(folder)
    with pytest.raises(NumericsError, match=r"model\.layers\.2\.mlp\.up_proj\.weight holds NaN or"):
        layercut.run(recipe | {"model": str(folder)}, tmp_path / "out")


def test_an_earlier_output_needs_overwrite_and_survives_a_failed_one(
    recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    layercut.run(recipe, out)
    before = tree(out)
    with pytest.raises(OutputError, match="--overwrite"):
        layercut.run(recipe, out)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("layercut.pipeline.run.verify_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            layercut.run(recipe, out, overwrite=True)
    assert tree(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.progress", "text.txt"]
    layercut.run(
        recipe | {"selection": {"strategy": "lowest", "drop_layers": 1}}, out, overwrite=True
    )
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "text.txt"]


def test_the_source_folder_is_never_written_to(recipe: dict, tiny_llama: Path, tmp_path: Path):
    before = tree(tiny_llama)
    layercut.run(recipe, tmp_path / "out")
    with pytest.raises(OutputError, match="source"):
        layercut.run(recipe, tiny_llama, overwrite=True)
    assert tree(tiny_llama) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_the_program_cleanly(
    recipe: dict, tmp_path: Path, number: signal.Signals, code: int
):
    recipe["evaluation"]["max_tokens"] = 10**9
    Path(recipe["evaluation"]["text"]["fox"]).write_text(TEXT * 20)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "layercut", "run", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(
        [*command, "--output-dir", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "evaluate" in line:
            break
    time.sleep(0.5)
    process.send_signal(number)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, (lines, errors)
    assert "Traceback" not in errors
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml", "text.txt"]


def test_embedded_model_end_to_end(tmp_path: Path):
    """The real model and data, small: two layers go, the text stays readable."""
    recipe = {
        "model": "embedded:smollm2-135m",
        "calibration": {"n_sequences": 4, "seq_len": 128, "gradient_batch": 2},
        "scoring": {"method": "gradmap"},
        "selection": {"strategy": "lowest", "rounds": "each", "drop_layers": 2},
        "recovery": {"method": "projection"},
        "evaluation": {"text": {"speeches": "embedded:speeches"}, "max_tokens": 1024},
    }
    result = layercut.run(recipe, tmp_path / "out")
    dense, pruned = (result.stages[name] for name in ("dense", "pruned"))
    assert (dense.n_layers, dense.n_parameters) == (30, 134_515_008)
    # A layer holds 2 × 576² + 2 × 576·192 + 3 × 576·1536 + 2 × 576 parameters.
    assert pruned.n_parameters == dense.n_parameters - 2 * 3_540_096
    ratio = pruned.perplexity["speeches"].value / dense.perplexity["speeches"].value
    assert 1 < ratio < 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in text
