"""What an early run refuses before any long work: through the pipeline, and on its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import layercut
from layercut.errors import DataError, LayercutError, PlanError, RecipeError
from layercut.models.view import DecoderView
from layercut.training import early_steps
from layercut.training.early_steps import EarlyRunOptions
from layercut.types import CalibrationBatches

SMALL = {"batch_size": 2, "accumulation": 2, "steps": 3, "max_length": 64}
BEYOND_SAFE = {"merge": "beyond-safe", "n_safe": 2}


def write_rows(path: Path, answers: list[int]) -> str:
    lines = [{"prompt": f"{n} is", "choices": [" even", " odd"], "answer": n} for n in answers]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Eight rows of a task with two classes."""
    return write_rows(tmp_path / "rows.jsonl", [0, 1] * 4)


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    return {
        "model": str(tiny_llama),
        "calibration": {"data": str(text), "n_sequences": 4, "seq_len": 32, "gradient_batch": 2},
        "scoring": {"method": "random"},
        "selection": {"strategy": "lowest", "drop_layers": 2},
        "recovery": {"method": "none"},
        "evaluation": {"text": {"fox": str(text)}, "seq_len": 64, "max_tokens": 256},
    }


CASES: list[tuple[dict[str, Any], type[LayercutError], str]] = [
    ({"data": "missing.jsonl"}, DataError, "missing.jsonl"),
    ({"steps": 7}, RecipeError, "to record 7 steps, but the run it begins has only 6"),
    ({"batch_size": 9}, DataError, r"8 training row\(s\) are fewer .*the early run's batch_size"),
    ({"max_length": 129}, RecipeError, "the early run's max_length is 129, but .* is 128 tokens"),
]


@pytest.mark.parametrize("room", ["scoring", "recovery"])
@pytest.mark.parametrize(("change", "error", "message"), CASES)
def test_a_run_that_cannot_be_made_is_refused_before_any_compute(
    recipe: dict[str, Any],
    rows: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    room: str,
    change: dict[str, Any],
    error: type[LayercutError],
    message: str,
):
    monkeypatch.delattr("layercut.evaluation.recorded_evaluation.evaluate")
    method = {"scoring": "igia", "recovery": "sign-merge"}[room]
    recipe[room] = {"method": method, "options": SMALL | {"data": rows} | change}
    with pytest.raises(error, match=message):
        layercut.run(recipe, tmp_path / "out")


@pytest.mark.parametrize("amount", [{"drop_layers": 2}, {"drop_fraction": 0.3}, {"drop": [2, 3]}])
def test_safe_layers_are_compared_with_the_request_before_any_compute(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amount: dict[str, Any]
):
    monkeypatch.delattr("layercut.evaluation.recorded_evaluation.evaluate")
    recipe["selection"] = {"strategy": "lowest", **amount}
    recipe["recovery"] = {"method": "sign-merge", "options": BEYOND_SAFE}
    with pytest.raises(PlanError, match="n_safe is 2, but only 2 layers are dropped"):
        layercut.run(recipe, tmp_path / "out")


def test_a_seed_beyond_the_trainers_range_is_folded(
    recipe: dict[str, Any], rows: str, tmp_path: Path
):
    recipe["scoring"] = {"method": "igia", "options": SMALL | {"data": rows}}
    plans = [
        layercut.run(recipe | {"seed": seed}, tmp_path / str(seed)).plan for seed in (3, 2**32 + 3)
    ]
    assert plans[0] is not None
    assert plans[1] is not None
    assert plans[0].rounds == plans[1].rounds


def test_a_class_without_rows_is_refused(
    view: DecoderView, batches: CalibrationBatches, tmp_path: Path
):
    source = write_rows(tmp_path / "odd.jsonl", [1] * 8)
    with pytest.raises(DataError, match="no training row has the answer 'even'"):
        early_steps.check_early_run(view, batches, EarlyRunOptions(data=source, **SMALL))


def test_calibration_text_is_enough_for_the_defaults(
    view: DecoderView, batches: CalibrationBatches
):
    early_steps.check_early_run(view, batches, EarlyRunOptions())
    with pytest.raises(RecipeError, match="to record 40 steps, but the run it begins has only 39"):
        early_steps.check_early_run(view, batches, EarlyRunOptions(max_steps=39))
