"""What the benchmarks hand to the methods that they compare."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import layercut
from layercut.comparison.row import Row
from layercut.data.tasks import TaskRow
from layercut.models.view import DecoderView
from layercut.recipe.finetune import FinetuneConfig
from layercut.results import Estimate, Evaluation
from layercut.training import early_steps
from layercut.training.finetune import check_rows
from layercut.types import CalibrationBatches

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.mark.parametrize(
    "row",
    [
        TaskRow("2+2=", ("4",)),
        TaskRow("2+2=", (" 3", " 4"), 1),
        TaskRow("As", (" Ann", " Sue"), 1, ending=" ran."),
        TaskRow("", ("Ann", "Sue"), ending=" ran."),
        TaskRow("", ("Hello",), messages=({"role": "user", "content": "Hi"},)),
    ],
)
def test_rows_survive_their_file(benchmark: Any, tmp_path: Path, row: TaskRow):
    source = benchmark("task_files").write_rows([row], tmp_path / "rows.jsonl")
    assert source == str(tmp_path / "rows.jsonl")


def test_rows_that_no_file_can_hold_are_not_written_as_others(benchmark: Any, tmp_path: Path):
    # Two gaps: the row would be read as a plain question.
    row = TaskRow("A _ and", (" Ann", " Sue"), ending=" ran.")
    with pytest.raises(ValueError, match="rows were written as other rows"):
        benchmark("task_files").write_rows([row], tmp_path / "rows.jsonl")


def test_the_early_run_learns_the_drawn_rows(
    benchmark: Any,
    view: DecoderView,
    batches: CalibrationBatches,
    monkeypatch: pytest.MonkeyPatch,
):
    gradpruner = benchmark("gradpruner")
    built: list[Any] = []
    original = early_steps.build_trainer

    def build(*arguments: Any, **settings: Any) -> Any:
        built.append(original(*arguments, **settings))
        return built[-1]

    monkeypatch.setattr(early_steps, "build_trainer", build)
    drawn = [TaskRow(f"{n} is", (" even", " odd"), n % 2) for n in (7, 2, 5, 4, 3, 8, 1, 6)]
    settings = FinetuneConfig(batch_size=2, accumulation=2, epochs=2, max_length=64, seed=1)
    gradpruner.prune(view, batches, drawn, settings, "igia+none", 2, 3)
    (trainer,) = built
    expected = [example["input_ids"] for example in check_rows(view, drawn, settings)]
    assert trainer.train_dataset["input_ids"][:] == expected
    assert trainer.state.max_steps == 4


def about_a_fox(model: Path, folder: Path) -> dict[str, Any]:
    """Settings of a comparison on one short text, without methods."""
    text = folder / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 50)
    return {
        "model": str(model),
        "drop_layers": [1],
        "evaluation": {"text": {"fox": str(text)}, "seq_len": 32, "max_tokens": 64},
        "layer_losses": False,
    }


def test_the_page_of_all_methods_shows_what_is_there(
    benchmark: Any, tiny_llama: Path, batches: CalibrationBatches, tmp_path: Path
):
    settings = about_a_fox(tiny_llama, tmp_path) | {"methods": ["shortgpt"]}
    rows = [TaskRow(f"{n} is", (" even", " odd"), n % 2) for n in range(4)]
    source = benchmark("task_files").write_rows(rows, tmp_path / "rows.jsonl")
    result = layercut.compare(settings, tmp_path / "out", batches=batches)
    page = benchmark("benchmark_page").page
    assert "| 1 | shortgpt |" in page([result])
    assert "Zero-shot" not in page([result])
    assert "### Ours" not in page([result])
    settings["evaluation"]["tasks"] = {"parity": source}
    settings["methods"] = ["reverse-order"]
    result = layercut.compare(settings, tmp_path / "out", batches=batches)
    accuracy = page([result]).partition("### Zero-shot")[2].partition("## What")[0]
    assert "| 0 | dense |" in accuracy
    assert "| 1 | reverse-order |" in accuracy
    assert "shortgpt" not in accuracy


def test_the_page_is_the_same_from_files_and_has_a_part_per_budget(
    benchmark: Any, tiny_llama: Path, batches: CalibrationBatches, tmp_path: Path
):
    settings = about_a_fox(tiny_llama, tmp_path) | {"methods": ["shortgpt"]}
    half = replace(batches, input_ids=batches.input_ids[::2], fingerprint="half")
    results = [
        layercut.compare(settings, tmp_path / name, batches=drawn)
        for name, drawn in (("half", half), ("all", batches))
    ]
    module = benchmark("benchmark_page")
    whole = module.page(results)
    assert whole == module.page(
        [module.read(tmp_path / n / "compare.json") for n in ("all", "half")]
    )
    n_tokens = batches.input_ids.numel()
    first, second = whole.split(" calibration tokens\n\n")[:2]
    assert first.endswith(f"## {n_tokens:,}")
    assert second.endswith(f"## {n_tokens // 2:,}")
    assert whole.count("| 1 | shortgpt |") == 2
    assert whole.count("## What the names stand for") == 1


def test_the_page_shows_ours_beside_the_best_peer_and_healed(
    benchmark: Any, tiny_llama: Path, batches: CalibrationBatches, tmp_path: Path
):
    (tmp_path / "more.txt").write_text("The dog was asleep in the sun all day long. " * 20)
    settings = about_a_fox(tiny_llama, tmp_path) | {
        "methods": ["ours", "sleb", "uidl"],
        "heal_methods": ["ours"],
        "heal": {
            "steps": 2,
            "data": [str(tmp_path / "text.txt"), str(tmp_path / "more.txt")],
            "seq_len": 16,
            "batch_size": 1,
            "held_out": 1,
            "label_weight": 0.5,
        },
    }
    result = layercut.compare(settings, tmp_path / "out", batches=batches)
    page = benchmark("benchmark_page").page([result])
    of = {row.method: row for row in result.rows}
    ratios = {name: row.ratios(result.dense)["fox"] for name, row in of.items()}
    best = min(("sleb", "uidl"), key=ratios.__getitem__)
    mine, its = ratios["ours"], ratios[best]
    peers = page.partition("### Ours and")[2].partition("## ")[0]
    assert f"| {its:.3f} ({best}) | {(mine - 1) / (its - 1):.2f} |" in peers
    healed = page.partition("### After a heal")[2].partition("## ")[0]
    dense = ratios["dense, healed 2 steps, 50 % labels"]
    name = "ours, healed 2 steps, 50 % labels"
    ratio, error = ratios[name], of[name].ratio_errors(result.dense)["fox"]
    numbers = f"{ratio:.3f} ± {error:.3f} | {ratio / dense:.3f}"
    assert f"| 1 | {name} | text.txt + more.txt | {numbers} |" in healed
    assert "healed" not in page.partition("### Perplexity")[2].partition("## ")[0]


def test_a_healed_row_is_divided_by_the_dense_model_healed_alike(benchmark: Any):
    module = benchmark("benchmark_page")
    rows = [
        Row(
            key="",
            method="",
            layers=layers,
            heal={"settings": {"steps": steps}},
            evaluation=Evaluation(6, 1, perplexity={"fox": Estimate(perplexity, 0.0, 1)}),
        )
        for layers, steps, perplexity in ((0, 2, 8.0), (0, 9, 5.0), (3, 9, 15.0), (3, 1, 20.0))
    ]
    alike = module.dense_healed_as(rows[2], rows)
    assert alike is rows[1]
    assert module.over_dense(rows[2], alike, "fox") == 3.0
    assert module.over_dense(rows[2], alike, "a text that came later") is None
    assert module.dense_healed_as(rows[3], rows) is None
