"""Contestants within one dense model, against the single stages on a model that is really cut."""

from __future__ import annotations

import csv
import html
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import layercut
from conftest import save_tiny
from layercut.activations import ResidualStream
from layercut.comparison import choosing
from layercut.comparison.contestants import PRESETS
from layercut.comparison.result import cells, completed, titles
from layercut.comparison.store import Store
from layercut.data.calibration import evaluation_windows
from layercut.errors import NumericsError, OutputError, PlanError, RecipeError
from layercut.evaluation import harness
from layercut.heal_trainer import HealTrainer
from layercut.models.load import reload
from layercut.models.view import DecoderView
from layercut.recovery import refit

TEXT = "The quick brown fox jumps over the lazy dog. " * 200


@pytest.fixture
def settings(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    rows = tmp_path / "rows.jsonl"
    made = [{"prompt": f"{i} is", "choices": [" odd", " even"], "answer": i % 2} for i in range(6)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    return {
        "model": str(tiny_llama),
        "dtype": "float32",
        "calibration": {"data": str(text), "n_sequences": 4, "seq_len": 32, "gradient_batch": 2},
        "drop_layers": [1, 2],
        "methods": ["shortgpt", "sleb", "gradmap"],
        "evaluation": {
            "text": {"fox": str(text)},
            "tasks": {"parity": str(rows)},
            "seq_len": 32,
            "max_tokens": 128,
        },
        "layer_losses": False,
    }


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
        how, recovery = ways[row["method"]]
        cut = reload(view)
        plan, evidence = layercut.select(cut, batches, drop_layers=row["layers"], **how)
        patch = layercut.fit(cut, plan, evidence, batches, method=recovery)
        layercut.apply(cut, plan, patch)
        known = {key: settings["evaluation"][key] for key in ("text", "tasks")}
        figures = layercut.evaluate(cut, **known, seq_len=32, max_tokens=128, speed=False)
        assert row["dropped"] == list(plan.dropped)
        assert row["n_parameters"] == cut.n_parameters
        assert row["perplexity"]["fox"]["value"] == pytest.approx(
            figures.perplexity["fox"].value, rel=1e-5
        )
        assert row["accuracy"]["parity"]["value"] == figures.accuracy["parity"].value


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
    with view.skipping(row["dropped"]):
        change = view.token_losses(windows).mean(dim=1) - before
    error = float(change.std()) / len(change) ** 0.5
    assert row["ratio_stderr"]["fox"] == pytest.approx(row["ratio"]["fox"] * error, rel=0.01)
    # A row from before losses were kept has a ratio and no error.
    del row["losses"]
    assert completed(row, result.dense)["ratio_stderr"] == {}


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
        assert (told["Decoding, tokens/s"] == "–") == (0 in row["dropped"])
    assert "fox: 4 windows of 32 tokens" in (tmp_path / "out/report.html").read_text()


def test_every_preset_runs(settings: dict[str, Any], tmp_path: Path):
    # Some protect the first four layers and the last two.
    settings["model"] = str(save_tiny(tmp_path / "deep", num_hidden_layers=10))
    settings |= {"methods": ["published"], "drop_layers": [2]}
    result = layercut.compare(settings, tmp_path / "out")
    assert [row["reason"] for row in result.rows if row["reason"] is not None] == []
    assert {row["method"] for row in result.rows} == set(PRESETS)
    assert all(len(row["dropped"]) == 2 for row in result.rows)


@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm_eval is not installed")
def test_tasks_of_the_harness_are_measured_and_added_once(settings: dict[str, Any], tmp_path: Path):
    settings |= {"methods": ["shortgpt"], "drop_layers": [1]}
    layercut.compare(settings, tmp_path / "out")
    task = harness_task(tmp_path)
    evaluation = {**settings["evaluation"], "harness": [task], "harness_limit": 4}
    result = layercut.compare({**settings, "evaluation": evaluation}, tmp_path / "out")
    (row,) = result.rows
    assert row["harness"]["parity"]["acc"]["n_rows"] == 4
    assert row["accuracy_change"]["parity (acc)"]["n_rows"] == 4
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
    rows = {row["pair"]: row for row in layercut.compare(settings, tmp_path / "out").rows}
    plain, repaired = rows["block-influence+none"], rows[f"block-influence+{recovery}"]
    # One cut, one 16 × 16 matrix; a multiplication and an addition for each of its entries.
    assert repaired["n_parameters"] == plain["n_parameters"] + 256
    assert repaired["flops_per_token"] == plain["flops_per_token"] + 512


def test_a_heal_is_a_row_of_its_own_and_dense_is_healed_beside_it(
    settings: dict[str, Any], tmp_path: Path
):
    heal = {"steps": 2, "seq_len": 16, "batch_size": 2, "held_out": 2, "evaluations": 1}
    settings |= {"methods": ["shortgpt", "block-influence+ghost"], "drop_layers": [2]}
    settings |= {"heal": heal, "heal_methods": ["shortgpt"]}
    result = layercut.compare(settings, tmp_path / "out")
    rows = {(row["method"], row["layers"]): row for row in result.rows}
    assert set(rows) == {
        ("dense, healed 2 steps", 0),
        ("shortgpt", 2),
        ("shortgpt, healed 2 steps", 2),
        ("block-influence+ghost", 2),
    }
    healed = rows["shortgpt, healed 2 steps", 2]
    assert rows["dense, healed 2 steps", 0]["ratio"] == {"fox": 1.0}
    assert healed["dropped"] == rows["shortgpt", 2]["dropped"]
    assert healed["n_parameters"] == rows["shortgpt", 2]["n_parameters"]
    assert healed["seconds"]["heal"] == healed["heal"]["train_seconds"] > 0
    before = (tmp_path / "out/rows.jsonl").read_bytes()
    layercut.compare(settings, tmp_path / "out")
    assert (tmp_path / "out/rows.jsonl").read_bytes() == before


def test_a_heal_that_learns_the_text_trains_the_dense_model_too(
    settings: dict[str, Any], tmp_path: Path
):
    heal = {"steps": 2, "seq_len": 16, "batch_size": 2, "held_out": 2, "evaluations": 1}
    settings |= {"methods": ["shortgpt"], "drop_layers": [2], "heal": {**heal, "label_weight": 1.0}}
    rows = {row["method"]: row for row in layercut.compare(settings, tmp_path / "out").rows}
    healed = rows["dense, healed 2 steps, 100 % labels"]
    assert healed["heal"]["n_steps"] == 2
    assert healed["ratio"]["fox"] != 1.0


def test_a_heal_that_was_cut_off_goes_on_from_its_checkpoint(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    heal = {"steps": 6, "seq_len": 16, "batch_size": 2, "held_out": 2, "save_steps": 2}
    settings |= {"methods": ["shortgpt"], "drop_layers": [2], "heal": {**heal, "evaluations": 3}}
    whole = layercut.compare(settings, tmp_path / "whole")
    original, n_losses = HealTrainer.compute_loss, 0

    def cut_off(*given: Any, **options: Any) -> Any:
        nonlocal n_losses
        n_losses += 1
        if n_losses == 4:
            raise KeyboardInterrupt
        return original(*given, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(HealTrainer, "compute_loss", cut_off)
        layercut.compare(settings, tmp_path / "out")
    assert (tmp_path / "out/healing/checkpoint-2").is_dir()
    result = layercut.compare(settings, tmp_path / "out")
    assert not (tmp_path / "out/healing").exists()
    healed, expected = (
        {row["method"]: row for row in found.rows}["shortgpt, healed 6 steps"]
        for found in (result, whole)
    )
    assert healed["heal"]["resumed_at"] == 2
    assert healed["heal"]["losses"] == expected["heal"]["losses"]
    assert healed["ratio"] == expected["ratio"]


def test_a_heal_that_failed_is_tried_again(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    heal = {"steps": 2, "seq_len": 16, "batch_size": 2, "held_out": 2, "evaluations": 1}
    settings |= {"methods": ["shortgpt"], "drop_layers": [2], "heal": heal}

    def fail(*_: Any, **__: Any) -> None:
        raise NumericsError("the held-out loss is nan at step 1.")

    with monkeypatch.context() as patched:
        patched.setattr("layercut.heal.heal", fail)
        first = layercut.compare(settings, tmp_path / "out")
    failed = {row["method"]: row for row in first.rows}["shortgpt, healed 2 steps"]
    assert failed["reason"] == "the held-out loss is nan at step 1."
    second = layercut.compare(settings, tmp_path / "out")
    healed = {row["method"]: row for row in second.rows}["shortgpt, healed 2 steps"]
    assert healed["reason"] is None
    assert healed["heal"]["settings"]["steps"] == healed["heal"]["n_steps"] == 2
    assert len(second.rows) == len(first.rows)


def test_a_foreign_healing_folder_is_refused_before_anything_runs(
    settings: dict[str, Any], tmp_path: Path
):
    heal = {"steps": 2, "seq_len": 16, "batch_size": 2, "held_out": 2}
    settings |= {"methods": ["shortgpt"], "drop_layers": [2], "heal": heal}
    (tmp_path / "out/healing").mkdir(parents=True)
    (tmp_path / "out/healing/notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="was not made by layercut"):
        layercut.compare(settings, tmp_path / "out")
    assert not Store(tmp_path / "out").rows.known


def test_a_measured_row_survives_what_could_not_be_added(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings |= {"methods": ["shortgpt"], "drop_layers": [1]}
    first = layercut.compare(settings, tmp_path / "out")

    def fail(*_: Any, **__: Any) -> None:
        raise NumericsError("the speed is nan.")

    monkeypatch.setattr("layercut.comparison.judging.decode_tokens_per_second", fail)
    with pytest.raises(NumericsError):  # the dense model itself
        layercut.compare({**settings, "speed": True}, tmp_path / "out")
    calls = iter([50.0])

    def once(*_: Any) -> float:
        if (value := next(calls, None)) is None:
            raise NumericsError("the speed is nan.")
        return value

    monkeypatch.setattr("layercut.comparison.judging.decode_tokens_per_second", once)
    second = layercut.compare({**settings, "speed": True}, tmp_path / "out")
    assert timeless(second.rows) == timeless(first.rows)
    assert any("shortgpt, 1 layers, stays as it was" in told for told in second.warnings)


def test_rows_of_an_earlier_revision_are_measured_anew(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings |= {"methods": ["block-influence+refit"], "drop_layers": [1]}
    layercut.compare(settings, tmp_path / "out")
    n_rows = len(Store(tmp_path / "out").rows.known)
    monkeypatch.setattr(refit, "REVISION", refit.REVISION + 1)
    layercut.compare(settings, tmp_path / "out")
    assert len(Store(tmp_path / "out").rows.known) == n_rows + 1


def test_other_arithmetic_is_another_comparison(settings: dict[str, Any], tmp_path: Path):
    settings |= {"methods": ["reverse-order"], "drop_layers": [1], "dtype": "float32"}
    layercut.compare(settings, tmp_path / "out")
    identity = json.loads((tmp_path / "out/settings.json").read_text())
    identity["mixed_precision"] = True
    (tmp_path / "out/settings.json").write_text(json.dumps(identity))
    with pytest.raises(OutputError, match="mixed_precision True there, False now"):
        layercut.compare(settings, tmp_path / "out")


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
    assert [row["method"] for row in rows] == ["dense"] + [row["method"] for row in result.rows]
    assert float(rows[1]["ratio.fox"]) == result.rows[0]["ratio"]["fox"]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "http" not in page.replace("http://www.w3.org", "")
    assert set(result.correlations()) == {"block-influence", "gradmap"}


def test_a_scoring_is_made_once_and_booked_to_all(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made: list[tuple[str, tuple[int, ...]]] = []
    original = choosing.score

    def counted(view: DecoderView, *rest: Any, method: str, **options: Any) -> Any:
        made.append((method, tuple(sorted(view.skipped))))
        return original(view, *rest, method=method, **options)

    monkeypatch.setattr(choosing, "score", counted)
    settings["methods"] = ["sleb", "shortened-llama-ppl", "perplexity+refit"]
    result = layercut.compare({**settings, "layer_losses": True}, tmp_path / "out")
    assert len(made) == len(set(made)) == 2  # the intact model, and SLEB's second round
    store = Store(tmp_path / "out")
    seconds = [record["seconds"] for record in store.scores.known.values()]
    spent = {(row["method"], row["layers"]): row["seconds"]["score"] for row in result.rows}
    assert spent["sleb", 1] == spent["shortened-llama-ppl", 2] == seconds[0]
    assert spent["sleb", 2] == pytest.approx(sum(seconds))
    made.clear()
    again = layercut.compare({**settings, "methods": ["perplexity+projection"]}, tmp_path / "out")
    assert made == []
    assert len(again.rows) == len(result.rows) + 2


def test_dense_activations_are_booked_to_all_who_read_them(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = ResidualStream.advance

    def slow_at_first(stream: ResidualStream, layer: int) -> None:
        n_known = len(stream.layer_seconds)
        original(stream, layer)
        if len(stream.layer_seconds) > n_known:
            stream.layer_seconds[-1] = 100.0

    monkeypatch.setattr(ResidualStream, "advance", slow_at_first)
    settings |= {"methods": ["block-influence+ghost", "block-influence+linear-patch"]}
    settings["drop_layers"] = [1]
    first, second = sorted(
        layercut.compare(settings, tmp_path / "out").rows, key=lambda row: row["pair"]
    )
    assert first["dropped"] == second["dropped"]
    n_read = second["dropped"][0] + 1  # up to the layer behind the cut; then every layer is read
    assert first["seconds"]["recover"] < 100
    assert second["seconds"]["recover"] > 100 * n_read


def test_dense_activations_are_shared(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recoveries = ("projection", "refit", "linear-map", "magnitude-rescale", "ghost", "linear-patch")
    settings["methods"] = [f"block-influence+{name}" for name in recoveries]
    walked: list[int] = []
    original = DecoderView.run_layer

    def counted(view: DecoderView, layer: int, *rest: Any) -> Any:
        walked.append(layer)
        return original(view, layer, *rest)

    monkeypatch.setattr(DecoderView, "run_layer", counted)
    shared = layercut.compare(settings, tmp_path / "shared")
    n_shared = len(walked)
    monkeypatch.setattr("layercut.comparison.arena.SHARED_BYTES", 0)
    apart = layercut.compare(settings, tmp_path / "apart")
    assert n_shared < len(walked) - n_shared
    assert timeless(shared.rows) == timeless(apart.rows)


def test_a_second_call_goes_on_behind_the_rows_that_are_there(
    settings: dict[str, Any], tmp_path: Path
):
    whole = layercut.compare(settings, tmp_path / "whole")
    parts = tmp_path / "parts"
    layercut.compare({**settings, "drop_layers": [1], "methods": ["sleb"]}, parts)
    first = (parts / "rows.jsonl").read_bytes()
    result = layercut.compare(settings, parts)
    assert (parts / "rows.jsonl").read_bytes().startswith(first)
    assert timeless(result.rows) == timeless(whole.rows)
    before = (parts / "rows.jsonl").read_bytes()
    layercut.compare(settings, parts)
    assert (parts / "rows.jsonl").read_bytes() == before


def test_a_text_is_added_to_finished_rows(settings: dict[str, Any], tmp_path: Path):
    first = layercut.compare(settings, tmp_path / "out")
    other = tmp_path / "other.txt"
    other.write_text("Something else entirely, at some length. " * 30)
    evaluation = settings["evaluation"]
    evaluation = {**evaluation, "text": {**evaluation["text"], "other": str(other)}}
    second = layercut.compare({**settings, "evaluation": evaluation}, tmp_path / "out")
    for before, after in zip(timeless(first.rows), timeless(second.rows), strict=True):
        assert after["perplexity"]["fox"] == before["perplexity"]["fox"]
        assert after["ratio"].keys() == {"fox", "other"}


def test_other_settings_in_the_same_folder_are_refused(settings: dict[str, Any], tmp_path: Path):
    settings["methods"] = ["shortgpt"]
    layercut.compare(settings, tmp_path / "out")
    other = {**settings, "seed": 1}
    with pytest.raises(OutputError, match="seed 0 there, 1 now"):
        layercut.compare(other, tmp_path / "out")
    assert len(layercut.compare(other, tmp_path / "out", overwrite=True).rows) == 2


def test_a_method_that_cannot_run_is_a_row_that_says_why(tmp_path: Path, settings: dict[str, Any]):
    # A norm behind the down-projection: nothing linear can be folded into the weights.
    settings["model"] = str(save_tiny(tmp_path / "olmo2", "olmo2"))
    settings["methods"] = ["ours", "shortgpt", "block-influence+projection"]
    result = layercut.compare(settings, tmp_path / "out")
    reasons = {(row["method"], row["layers"]): row["reason"] for row in result.rows}
    assert reasons["shortgpt", 1] is None
    assert "norm" in reasons["ours", 2]
    assert "norm" in reasons["block-influence+projection", 1]
    assert html.escape(reasons["ours", 1]) in (tmp_path / "out/report.html").read_text().replace(
        "&#39;", "&#x27;"
    )


def test_a_bug_in_a_method_is_not_swallowed(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr("layercut.comparison.arena.fit", broken)
    with pytest.raises(ZeroDivisionError):
        layercut.compare(settings, tmp_path / "out")


def test_layer_losses_that_fail_leave_the_rest(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = choosing.score

    def failing(*given: Any, method: str, **options: Any) -> Any:
        if method == "perplexity":
            raise NumericsError("the loss is nan.")
        return original(*given, method=method, **options)

    monkeypatch.setattr(choosing, "score", failing)
    settings |= {"methods": ["shortgpt"], "drop_layers": [1], "layer_losses": True}
    result = layercut.compare(settings, tmp_path / "out")
    assert result.truth is None
    assert result.rows[0]["reason"] is None
    assert any("loss without each layer is not known" in told for told in result.warnings)
    assert (tmp_path / "out/report.html").is_file()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"methods": ["shortgtp"]}, RecipeError, "did you mean 'shortgpt'"),
        ({"drop_layers": [1, 5]}, PlanError, "cannot drop 5 of 6 layers"),
        ({"drop_layers": [0]}, RecipeError, "drop_layers"),
        ({"calibration": {"seq_len": 4096}}, RecipeError, "context is 128 tokens"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    settings: dict[str, Any], tmp_path: Path, change: dict[str, Any], error: type, message: str
):
    with pytest.raises(error, match=message):
        layercut.compare({**settings, **change}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_killed_run_keeps_its_rows(settings: dict[str, Any], tmp_path: Path):
    out = tmp_path / "out"
    code = "import json, sys, layercut; layercut.compare(json.loads(sys.argv[1]), sys.argv[2])"
    running = subprocess.Popen([sys.executable, "-c", code, json.dumps(settings), str(out)])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and running.poll() is None:
        rows = out / "rows.jsonl"
        if rows.exists() and rows.read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    kept = Store(out).rows.known
    assert len(kept) >= 3
    result = layercut.compare(settings, out)
    known = Store(out).rows.known
    assert {key: known[key] for key in kept} == kept
    whole = layercut.compare(settings, tmp_path / "whole")
    assert timeless(result.rows) == timeless(whole.rows)


def timeless(rows: Any) -> list[dict[str, Any]]:
    """Rows without what differs from run to run."""
    timed = {"seconds", "passes", "total_seconds"}
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]
