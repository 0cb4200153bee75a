"""A heal within a run, on a tiny model: stages, files, resumption, unseen windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import layercut
from conftest import byte_tokenizer, leading_tokenizer
from layercut.data.calibration import calibration_batches
from layercut.errors import DataError, RecipeError
from layercut.recipe.heal import HealConfig
from layercut.recipe.recipe import CalibrationConfig
from layercut.results import RunResult
from layercut.training.heal import heal
from layercut.training.heal_windows import heal_windows, hold_out

TEXT = "".join(f"{i} times {i} is {i * i}. " for i in range(900))


def recipe_in(folder: Path, model: Path) -> dict[str, Any]:
    (folder / "text.txt").write_text(TEXT)
    return {
        "model": str(model),
        "dtype": "float32",
        "calibration": {"data": str(folder / "text.txt"), "n_sequences": 8, "seq_len": 32},
        "selection": {"drop_layers": 2},
        "heal": {"steps": 12, "batch_size": 2, "seq_len": 32, "held_out": 4, "save_steps": 2},
        "evaluation": {"text": {"same": str(folder / "text.txt")}, "seq_len": 64},
    }


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    return recipe_in(tmp_path, tiny_llama)


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    """The output folder and the result of one whole run."""
    folder = tmp_path_factory.mktemp("finished")
    return folder / "out", layercut.run(recipe_in(folder, tiny_llama), folder / "out")


def test_the_healed_model_is_measured_and_told_of(finished: tuple[Path, RunResult]):
    out, result = finished
    assert list(result.stages) == ["dense", "pruned", "healed"]
    content = json.loads((out / "layercut/result.json").read_text())
    assert content["stages"]["healed"]["train_seconds"] > 0
    assert content["seconds"]["heal"] > 0
    assert content["heal"]["n_steps"] == 12
    assert content["heal"]["loss_after"] < content["heal"]["loss_before"]
    assert "Healed" in (out / "layercut/report.html").read_text()
    card = (out / "README.md").read_text()
    assert "| Dense | Pruned | Healed | Change |" in card
    assert "Healed by distillation from the input model: 12 steps" in card
    assert not out.with_name("out.training").exists()


def test_the_output_is_the_healed_model(finished: tuple[Path, RunResult]):
    out, result = finished
    view = layercut.load(str(out), dtype="float32")
    text = {"same": str(out.parent / "text.txt")}
    measured = layercut.evaluate(view, text=text, seq_len=64, speed=False)
    found = measured.perplexity["same"].value
    assert found == pytest.approx(result.stages["healed"].perplexity["same"].value, rel=1e-6)
    assert found != pytest.approx(result.stages["pruned"].perplexity["same"].value, rel=1e-6)


def test_an_interrupted_run_goes_on_and_says_so(
    finished: tuple[Path, RunResult],
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    def interrupted(*arguments: Any, **how: Any) -> None:
        heal(*arguments, **how)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("layercut.training.heal.heal", interrupted)
        with pytest.raises(KeyboardInterrupt):
            layercut.run(recipe, tmp_path / "out")
    assert {path.name for path in tmp_path.glob("out*")} == {"out.progress", "out.training"}
    result = layercut.run(recipe, tmp_path / "out")
    assert any("the heal went on from step 12 of 12" in line for line in result.warnings)
    assert {path.name for path in tmp_path.glob("out*")} == {"out"}
    outs = (finished[0], tmp_path / "out")
    weights = [(out / "model.safetensors").read_bytes() for out in outs]
    assert weights[0] == weights[1]


def test_a_fine_tuning_starts_from_the_healed_weights(
    finished: tuple[Path, RunResult], recipe: dict[str, Any], tmp_path: Path
):
    rows = [{"prompt": f"{i} is", "completion": " even" if i % 2 else " odd"} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe["finetune"] = {
        "data": str(tmp_path / "train.jsonl"),
        "batch_size": 2,
        "accumulation": 1,
        "max_steps": 2,
        "compare_dense": False,
        "keep_adapter": True,
        "max_length": 64,
    }
    result = layercut.run(recipe, tmp_path / "out")
    assert list(result.stages) == ["dense", "pruned", "healed", "pruned_tuned"]
    base = load_file(tmp_path / "out/layercut/base/model.safetensors")
    healed = load_file(finished[0] / "model.safetensors")
    assert all(torch.equal(base[name], healed[name]) for name in healed)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"held_out": 4000}, DataError, "heal.held_out 4000 and one step's heal.batch_size 2"),
        ({"seq_len": 200}, RecipeError, "heal.seq_len is 200, but the model's context is 128"),
        ({"seq_len": 50_000, "max_tokens": 60_000}, DataError, "fewer than one window"),
        ({"data": "nowhere.txt"}, DataError, "nowhere.txt"),
        ({"minutes": 1.0}, RecipeError, "give either minutes or steps"),
    ],
)
def test_bad_sections_are_refused_before_anything_is_computed(
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
):
    def computed(*_: Any, **__: Any) -> None:
        raise AssertionError("the long work has begun")

    monkeypatch.setattr("layercut.evaluation.recorded_evaluation.evaluate", computed)
    recipe["heal"] |= changes
    with pytest.raises(error, match=message):
        layercut.run(recipe, tmp_path / "out")


def windows_of(
    folder: Path, n_sequences: int, tokenizer: Any = None, **settings: Any
) -> tuple[torch.Tensor, ...]:
    (folder / "text.txt").write_text(TEXT)
    section = CalibrationConfig(data=str(folder / "text.txt"), n_sequences=n_sequences, seq_len=32)
    tokenizer = tokenizer or byte_tokenizer()
    batches = calibration_batches(section, tokenizer)
    chosen = HealConfig(**settings)
    return batches.input_ids, heal_windows(chosen, section, batches, tokenizer)


@pytest.mark.parametrize("seq_len", [32, 20, 48])
def test_no_window_holds_anything_of_the_calibration(tmp_path: Path, seq_len: int):
    used, windows = windows_of(tmp_path, 8, steps=40, batch_size=2, seq_len=seq_len)
    assert windows.shape == (88, seq_len)
    spans = {row.unfold(0, 16, 1)[i].numpy().tobytes() for row in used for i in range(17)}
    found = {part.numpy().tobytes() for row in windows for part in row.unfold(0, 16, 1)}
    assert not spans & found
    assert len({row.numpy().tobytes() for row in windows}) == 88


@pytest.mark.parametrize("seq_len", [32, 21])
def test_windows_behind_a_leading_token_hold_nothing_of_the_calibration_either(
    tmp_path: Path, seq_len: int
):
    tokenizer = leading_tokenizer()
    used, windows = windows_of(tmp_path, 8, tokenizer, steps=40, batch_size=2, seq_len=seq_len)
    assert windows.shape == (88, seq_len)
    assert {*windows[:, 0].tolist(), *used[:, 0].tolist()} == {1}
    spans = {row[i : i + 16].numpy().tobytes() for row in used[:, 1:] for i in range(16)}
    found = {part.numpy().tobytes() for row in windows[:, 1:] for part in row.unfold(0, 16, 1)}
    assert not spans & found


def test_a_text_that_the_calibration_has_used_up_is_taken_whole_and_said(tmp_path: Path):
    with pytest.warns(UserWarning, match="that the calibration has not used; the heal takes all"):
        used, windows = windows_of(tmp_path, 500, minutes=1.0, seq_len=32)
    rows = {row.numpy().tobytes() for row in windows}
    assert {row.numpy().tobytes() for row in used} <= rows


def test_held_out_windows_are_spread_and_do_not_train():
    windows = torch.arange(10)[:, None]
    training, held_out = hold_out(windows, 3)
    assert held_out.flatten().tolist() == [0, 3, 6]
    assert training.flatten().tolist() == [1, 2, 4, 5, 7, 8, 9]
