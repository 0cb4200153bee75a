"""Estimates within one dense model, against the single stages on a model that is really cut."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import layercut
from comparisons import comparison_of
from conftest import save_tiny
from layercut.comparison.entries import PRESETS
from layercut.comparison.result import cells, titles
from layercut.comparison.row import Row
from layercut.data.calibration import evaluation_windows
from layercut.errors import OutputError, RecipeError
from layercut.evaluation import harness
from layercut.models.load import reload
from layercut.models.view import DecoderView


@pytest.fixture
def settings(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    return comparison_of(tiny_llama, tmp_path)


def test_a_row_equals_the_single_stages_on_a_model_that_is_cut(
    settings: dict[str, Any], view: DecoderView, tmp_path: Path
):
    settings["methods"] = ["gradmap", "ours"]
    result = layercut.compare(settings, tmp_path / "out")
    batches = layercut.calibration_batches(settings["calibration"], view.tokenizer)
    ways: dict[str, tuple[dict[str, Any], str]] = {
        "gradmap": ({"strategy": "lowest", "scoring": "gradmap", "rounds": "each"}, "projection"),
        "ours": ({"protect": [0]}, "refit"),
    }
    for row in result.rows:
        how, recovery = ways[row.method]
        cut = reload(view)
        plan, evidence = layercut.select(cut, batches, drop_layers=row.layers, **how)
        patch = layercut.fit(cut, plan, evidence, batches, method=recovery)
        layercut.apply(cut, plan, patch)
        known = {key: settings["evaluation"][key] for key in ("text", "tasks")}
        evaluation = layercut.evaluate(cut, **known, seq_len=32, max_tokens=128, speed=False)
        assert row.dropped == plan.dropped
        assert row.evaluation.n_parameters == cut.n_parameters
        assert row.evaluation.perplexity["fox"].value == pytest.approx(
            evaluation.perplexity["fox"].value, rel=1e-5
        )
        assert row.evaluation.accuracy["parity"] == evaluation.accuracy["parity"]


def test_the_error_of_a_ratio_is_paired_by_window(
    settings: dict[str, Any], view: DecoderView, tmp_path: Path
):
    settings |= {"methods": ["reverse-order"], "drop_layers": [2]}
    result = layercut.compare(settings, tmp_path / "out")
    (row,) = result.rows
    cut = {key: settings["evaluation"][key] for key in ("seq_len", "max_tokens")}
    source = settings["evaluation"]["text"]["fox"]
    windows = evaluation_windows(source, view.tokenizer, detokenize=False, **cut)
    before = view.token_losses(windows).mean(dim=1)
    with view.skipping(row.dropped):
        change = view.token_losses(windows).mean(dim=1) - before
    error = float(change.std()) / len(change) ** 0.5
    ratio = row.ratios(result.dense)["fox"]
    assert row.ratio_errors(result.dense)["fox"] == pytest.approx(ratio * error, rel=0.01)
    # A row from before losses were kept has a ratio and no error.
    content = row.to_json()
    del content["losses"]
    assert Row.from_json(content).ratios(result.dense) == {"fox": ratio}
    assert Row.from_json(content).ratio_errors(result.dense) == {}


def test_speeds_and_windows_are_told_where_they_were_measured(
    settings: dict[str, Any], tmp_path: Path
):
    settings |= {"methods": ["shortgpt", "random"], "drop_layers": [1], "speed": True}
    result = layercut.compare(settings, tmp_path / "out")
    assert result.speeds == ("prefill_tokens_per_second", "decode_tokens_per_second")
    shown = [dict(zip(titles(result), cells(result, row), strict=True)) for row in result.rows]
    for row, told in zip(result.rows, shown, strict=True):
        assert float(told["Prefill, tokens/s"].replace(",", "")) > 0
        # Without layer 0 the library's cache does not know how many tokens it has seen.
        assert (told["Decoding, tokens/s"] == "–") == (0 in row.dropped)
        assert (told["× decoding"] == "–") == (0 in row.dropped)
        assert told["× prefill"].startswith(f"{row.evaluation.speed_change['prefill'].value:.2f} ±")
        assert Row.from_json(row.to_json()).evaluation.speed_change == row.evaluation.speed_change
    assert result.dense.evaluation.prefill_spread is not None
    assert result.dense.evaluation.speed_change == {}
    assert "fox: 4 windows of 32 tokens" in (tmp_path / "out/report.html").read_text()


def test_every_preset_runs(settings: dict[str, Any], tmp_path: Path):
    # Some protect the first four layers and the last two.
    settings["model"] = str(save_tiny(tmp_path / "deep", num_hidden_layers=10))
    settings |= {"methods": ["published"], "drop_layers": [2]}
    result = layercut.compare(settings, tmp_path / "out")
    assert [row.reason for row in result.rows if row.reason is not None] == []
    assert {row.method for row in result.rows} == set(PRESETS)
    assert all(len(row.dropped) == 2 for row in result.rows)


@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm_eval is not installed")
def test_tasks_of_the_harness_are_measured_and_added_once(settings: dict[str, Any], tmp_path: Path):
    settings |= {"methods": ["shortgpt"], "drop_layers": [1]}
    layercut.compare(settings, tmp_path / "out")
    task = harness_task(tmp_path)
    evaluation = {**settings["evaluation"], "harness": [task], "harness_limit": 4}
    result = layercut.compare({**settings, "evaluation": evaluation}, tmp_path / "out")
    (row,) = result.rows
    assert row.evaluation.harness["parity"]["acc"].n == 4
    assert row.accuracy_changes(result.dense)["parity (acc)"].n == 4
    assert "Zero-shot, parity" in titles(result)
    before = (tmp_path / "out/rows.jsonl").read_bytes()
    layercut.compare({**settings, "evaluation": evaluation}, tmp_path / "out")
    assert (tmp_path / "out/rows.jsonl").read_bytes() == before
    for other in ({**evaluation, "harness_limit": 5}, evaluation):
        with pytest.raises(OutputError, match=r"evaluation\.harness\.parity \w+ there, \w+ now"):
            layercut.compare({**settings, "evaluation": other}, tmp_path / "out")
        # The second time the limit is the same, but the rows are others.
        rows = tmp_path / "rows.jsonl"
        rows.write_text(rows.read_text().replace("0 is", "zero is"))
        harness._tasks.cache_clear()
    Path(task).write_text(Path(task).read_text().replace("multiple_choice", "generate_until"))
    harness._tasks.cache_clear()
    with pytest.raises(RecipeError, match="'parity' lets the model write"):
        layercut.compare({**settings, "evaluation": evaluation}, tmp_path / "other")


def harness_task(folder: Path) -> str:
    """The rows of the fixture as a task of lm-evaluation-harness."""
    path = folder / "parity.yaml"
    path.write_text(
        "task: parity\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: prompt\n"
        "doc_to_choice: choices\ndoc_to_target: answer\nmetric_list: [{metric: acc}]\n"
    )
    return str(path)


@pytest.mark.parametrize("recovery", ["ghost", "linear-patch"])
def test_what_cannot_be_folded_pays_for_its_extra_matrices(
    settings: dict[str, Any], tmp_path: Path, recovery: str
):
    settings |= {"methods": ["shortgpt", f"block-influence+{recovery}"], "drop_layers": [1]}
    rows = layercut.compare(settings, tmp_path / "out").rows
    by_pair = {row.pair: row.evaluation for row in rows}
    plain, repaired = by_pair["block-influence+none"], by_pair[f"block-influence+{recovery}"]
    # One cut, one 16 × 16 matrix; a multiplication and an addition for each of its entries.
    assert repaired.n_parameters == plain.n_parameters + 256
    assert repaired.flops_per_token == plain.flops_per_token + 512


def test_warnings_are_sentences_of_the_result(settings: dict[str, Any], tmp_path: Path):
    settings["calibration"]["n_sequences"] = 10_000
    settings |= {"methods": ["reverse-order"], "drop_layers": [1]}
    (warning,) = layercut.compare(settings, tmp_path / "out").warnings
    assert "fewer than the 10000 of 32 asked for" in warning
    assert warning in (tmp_path / "out/compare.json").read_text()


def test_files_hold_every_row(settings: dict[str, Any], tmp_path: Path):
    out = tmp_path / "out"
    result = layercut.compare({**settings, "layer_losses": True}, out)
    assert json.loads((out / "compare.json").read_text()) == result.to_json()
    with (out / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["dense"] + [row.method for row in result.rows]
    assert float(rows[1]["ratio.fox"]) == result.rows[0].ratios(result.dense)["fox"]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "http" not in page.replace("http://www.w3.org", "")
    assert set(result.correlations()) == {"block-influence", "gradmap"}
