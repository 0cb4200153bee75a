"""Fine-tuning within a run and on its own, on a tiny model: stages, files, resumption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import layercut
from conftest import save_tiny
from finetune_recipes import recipe_in
from layercut.errors import DataError, ModelError, RecipeError
from layercut.evaluation.accuracy import accuracy
from layercut.pipeline.finetune_stage import warn_if_worse
from layercut.results import Evaluation, RunResult
from layercut.training.finetune import finetune


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    return recipe_in(tmp_path, tiny_llama)


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    """The output folder and the result of one whole run."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = recipe_in(folder, tiny_llama)
    recipe["finetune"]["keep_adapter"] = True
    return folder / "out", layercut.run(recipe, folder / "out")


def test_dense_and_pruned_are_tuned_alike_and_measured(finished: tuple[Path, RunResult]):
    out, result = finished
    assert list(result.stages) == ["dense", "dense_tuned", "pruned", "pruned_tuned"]
    stages = json.loads((out / "layercut/result.json").read_text())["stages"]
    assert stages["dense_tuned"]["n_layers"] == stages["dense"]["n_layers"] == 6
    assert stages["pruned_tuned"]["n_layers"] == 4
    for name in ("dense_tuned", "pruned_tuned"):
        assert stages[name]["train_seconds"] > 0
        assert stages[name]["peak_rss_bytes"] > 0
        # Training changes no shape: the speed is that of the model it began with.
        before = stages[name.removesuffix("_tuned")]
        assert stages[name]["prefill_tokens_per_second"] == before["prefill_tokens_per_second"] > 0
        assert stages[name]["accuracy"]["parity"]["n_rows"] == 18
    assert stages["pruned_tuned"]["accuracy_change"]["parity"]["value"] == pytest.approx(
        stages["pruned_tuned"]["accuracy"]["parity"]["value"]
        - stages["dense_tuned"]["accuracy"]["parity"]["value"]
    )
    assert "train_seconds" not in stages["dense"]
    assert result.seconds["finetune"] > 0
    assert not out.with_name("out.training").exists()


def test_the_output_is_the_tuned_model(finished: tuple[Path, RunResult]):
    out, result = finished
    view = layercut.load(str(out), dtype="float32")
    tasks = {"parity": str(out.parent / "test.jsonl")}
    measured = layercut.evaluate(view, tasks=tasks, speed=False)
    assert measured.accuracy == result.stages["pruned_tuned"].accuracy


def test_the_adapter_on_its_base_is_the_output(finished: tuple[Path, RunResult]):
    out, result = finished
    assert result.warnings == []
    config = json.loads((out / "layercut/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(out / "layercut/base")
    base = AutoModelForCausalLM.from_pretrained(out / "layercut/base")
    merged = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, out / "layercut/adapter")(ids).logits
        expected = merged(ids).logits
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-3)


def test_untrained_tensors_are_copied(finished: tuple[Path, RunResult], tiny_llama: Path):
    source, written = (load_file(f / "model.safetensors") for f in (tiny_llama, finished[0]))
    names = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    assert all(torch.equal(source[name], written[name]) for name in names)


def test_pruning_starts_from_the_weights_of_the_checkpoint(
    finished: tuple[Path, RunResult], recipe: dict, tmp_path: Path
):
    recipe["finetune"]["compare_dense"] = False
    result = layercut.run(recipe, tmp_path / "alone")
    assert "dense_tuned" not in result.stages
    both, alone = (
        load_file(out / "model.safetensors") for out in (finished[0], tmp_path / "alone")
    )
    assert both.keys() == alone.keys()
    assert all(torch.equal(both[name], alone[name]) for name in both)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_narrow_checkpoints_are_tuned_in_float32_and_stored_narrow(
    recipe: dict, tmp_path: Path, mode: str
):
    folder = save_tiny(tmp_path / "narrow", tie_word_embeddings=True)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    recipe |= {"model": str(folder)}
    recipe["finetune"]["mode"] = mode
    layercut.tune_checkpoint(recipe, tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


@pytest.mark.parametrize("dense_is_tuned", [True, False])
def test_the_teacher_is_the_dense_model_tuned_if_it_was(
    recipe: dict,
    tmp_path: Path,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    dense_is_tuned: bool,
):
    recipe["finetune"]["distill"] = {"weight": 0.5}
    recipe["finetune"]["compare_dense"] = dense_is_tuned
    teachers = []

    def watched(view: Any, *arguments: Any, teacher: Any = None, **how: Any) -> Any:
        teachers.append(teacher)
        return finetune(view, *arguments, teacher=teacher, **how)

    monkeypatch.setattr("layercut.training.finetune.finetune", watched)
    layercut.run(recipe, tmp_path / "out")
    assert teachers[:-1] == [None] * dense_is_tuned
    source = load_file(tiny_llama / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    is_original = torch.equal(teachers[-1].model.get_parameter(name), source[name])
    assert is_original != dense_is_tuned


def test_an_interrupted_run_goes_on_and_says_so(
    finished: tuple[Path, RunResult],
    recipe: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    def interrupted(view: Any, *arguments: Any, **how: Any) -> Any:
        tuning = finetune(view, *arguments, **how)
        if view.n_layers == 4:
            raise KeyboardInterrupt
        return tuning

    with monkeypatch.context() as patched:
        patched.setattr("layercut.training.finetune.finetune", interrupted)
        with pytest.raises(KeyboardInterrupt):
            layercut.run(recipe, tmp_path / "out")
    assert {path.name for path in tmp_path.glob("out*")} == {"out.progress", "out.training"}
    result = layercut.run(recipe, tmp_path / "out")
    assert any(
        "pruned model went on from step 4 of 4; its seconds are those of both" in line
        for line in result.warnings
    )
    assert {path.name for path in tmp_path.glob("out*")} == {"out"}
    outs = (finished[0], tmp_path / "out")
    weights = [(out / "model.safetensors").read_bytes() for out in outs]
    assert weights[0] == weights[1]


@pytest.fixture
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def computed(*_: Any, **__: Any) -> None:
        raise AssertionError("the long work has begun")

    monkeypatch.setattr("layercut.evaluation.recorded_evaluation.evaluate", computed)
    monkeypatch.setattr("layercut.pipeline.finetune_run.evaluate", computed)


@pytest.mark.usefixtures("nothing_is_computed")
def test_bad_rows_are_refused_before_anything_is_computed(recipe: dict, tmp_path: Path):
    recipe["finetune"]["batch_size"] = 64
    with pytest.raises(DataError, match="fewer than one step's 128"):
        layercut.run(recipe, tmp_path / "out")
    recipe["finetune"] = None
    recipe["evaluation"]["tasks"]["parity"] = str(tmp_path / "text.txt")
    with pytest.raises(DataError, match=r"unknown file type '\.txt'"):
        layercut.run(recipe, tmp_path / "out")


@pytest.mark.usefixtures("nothing_is_computed")
def test_a_tokenizer_that_cannot_pad_is_refused_before_anything_is_computed(
    recipe: dict, tmp_path: Path
):
    folder = save_tiny(tmp_path / "endless")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("pad_token", "eos_token"):
        del config[name]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    recipe |= {"model": str(folder)}
    for run in (layercut.run, layercut.tune_checkpoint):
        with pytest.raises(ModelError, match="neither a padding nor an end-of-text token"):
            run(recipe, tmp_path / "out")


def test_a_checkpoint_is_tuned_on_its_own(recipe: dict, tmp_path: Path):
    result = layercut.tune_checkpoint(recipe, tmp_path / "out")
    assert list(result.stages) == ["dense", "dense_tuned"]
    out = tmp_path / "out"
    names = {"recipe.yaml", "result.json", "report.html"}
    assert {path.name for path in (out / "layercut").iterdir()} == names
    again = layercut.tune_checkpoint(out / "layercut/recipe.yaml", tmp_path / "again")
    assert again.stages["dense_tuned"].accuracy == result.stages["dense_tuned"].accuracy
    assert (out / "model.safetensors").read_bytes() == (
        tmp_path / "again/model.safetensors"
    ).read_bytes()
    assert "Before" in (out / "layercut/report.html").read_text()
    with pytest.raises(RecipeError, match="no section finetune"):
        layercut.tune_checkpoint(recipe | {"finetune": None}, tmp_path / "none")


def test_the_adapter_of_a_model_tuned_on_its_own_names_that_model(
    recipe: dict, tmp_path: Path, tiny_llama: Path
):
    recipe["finetune"]["keep_adapter"] = True
    layercut.tune_checkpoint(recipe, tmp_path / "out")
    adapter = tmp_path / "out/layercut/adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_llama)
    base, merged = (AutoModelForCausalLM.from_pretrained(f) for f in (tiny_llama, tmp_path / "out"))
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        after, expected = PeftModel.from_pretrained(base, adapter)(ids).logits, merged(ids).logits
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "out/layercut/base").exists()


def test_distilling_needs_a_pruned_model(recipe: dict, tmp_path: Path):
    recipe["finetune"]["distill"] = {"weight": 0.5}
    with pytest.raises(RecipeError, match="but nothing is pruned here"):
        layercut.tune_checkpoint(recipe, tmp_path / "out")


@pytest.mark.parametrize(("n_lost", "is_told"), [(3, False), (12, True)])
def test_a_tuning_that_makes_a_task_clearly_worse_is_told(
    n_lost: int, is_told: bool, recwarn: pytest.WarningsRecorder
):
    # Of 100 rows n are lost and none won: −n/100 ± √(n (100 − n) / 99) / 100 is 1.8 and 3.7 errors.
    right = (True,) * 80 + (False,) * 20
    fewer = (False,) * n_lost + right[n_lost:]
    before, after = (
        Evaluation(1, 1, accuracy={"parity": accuracy(outcomes)}) for outcomes in (right, fewer)
    )
    warn_if_worse(before, after, "pruned")
    assert [w.category for w in recwarn] == [UserWarning] * is_told
    if is_told:
        assert "pruned model's accuracy on parity by 12.0 ± 3.3 points" in str(recwarn[0].message)
