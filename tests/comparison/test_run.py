"""One folder from call to call: what is shared, kept, added, refused and tried again."""

from __future__ import annotations

import html
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import layercut
from comparisons import comparison_of, timeless
from conftest import save_tiny
from layercut import registry
from layercut.comparison import plans
from layercut.comparison.store import Store
from layercut.engine.residual_stream import ResidualStream
from layercut.errors import NumericsError, OutputError, PlanError, RecipeError
from layercut.evaluation.speed import Speeds
from layercut.models.view import DecoderView
from layercut.registry import MethodCall


@pytest.fixture
def settings(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    return comparison_of(tiny_llama, tmp_path)


def test_a_measured_row_survives_what_could_not_be_added(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings |= {"methods": ["shortgpt"], "drop_layers": [1]}
    first = layercut.compare(settings, tmp_path / "out")

    def fail(*_: Any, **__: Any) -> None:
        raise NumericsError("the speed is nan.")

    monkeypatch.setattr("layercut.comparison.measure.measure_speeds", fail)
    with pytest.raises(NumericsError):  # the dense model itself
        layercut.compare({**settings, "speed": True}, tmp_path / "out")

    def dense_alone(models: dict[str, Any]) -> dict[str, Speeds]:
        if len(models) > 1:
            raise NumericsError("the speed is nan.")
        return dict.fromkeys(models, Speeds((50.0,), (5.0,)))

    monkeypatch.setattr("layercut.comparison.measure.measure_speeds", dense_alone)
    second = layercut.compare({**settings, "speed": True}, tmp_path / "out")
    assert timeless(second) == timeless(first)
    assert any("shortgpt, 1 layers, stays as it was" in told for told in second.warnings)


def test_rows_of_an_earlier_revision_are_measured_anew(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings |= {"methods": ["block-influence+refit"], "drop_layers": [1]}
    layercut.compare(settings, tmp_path / "out")
    n_rows = len(Store(tmp_path / "out").rows.known)
    describe = registry.describe

    def describe_revised(stage: registry.Stage, name: str) -> registry.Method:
        method = describe(stage, name)
        return replace(method, revision=method.revision + 1) if name == "refit" else method

    monkeypatch.setattr(registry, "describe", describe_revised)
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


def test_a_scoring_is_made_once_and_booked_to_all(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made: list[tuple[str, tuple[int, ...]]] = []
    original = plans.score_layers

    def counted(view: DecoderView, batches: Any, scoring: MethodCall) -> Any:
        made.append((scoring.name, tuple(sorted(view.skipped))))
        return original(view, batches, scoring)

    monkeypatch.setattr(plans, "score_layers", counted)
    settings["methods"] = ["sleb", "shortened-llama-ppl", "perplexity+refit"]
    result = layercut.compare({**settings, "layer_losses": True}, tmp_path / "out")
    assert len(made) == len(set(made)) == 2  # the intact model, and SLEB's second round
    store = Store(tmp_path / "out")
    seconds = [record["seconds"] for record in store.scores.known.values()]
    spent = {(row.method, row.layers): row.seconds["score"] for row in result.rows}
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

    def slow_at_first(stream: ResidualStream, layer: int, *visit: Any) -> None:
        n_known = len(stream.layer_seconds)
        original(stream, layer, *visit)
        if len(stream.layer_seconds) > n_known:
            stream.layer_seconds[-1] = 100.0

    monkeypatch.setattr(ResidualStream, "advance", slow_at_first)
    settings |= {"methods": ["block-influence+ghost", "block-influence+linear-patch"]}
    settings["drop_layers"] = [1]
    first, second = sorted(
        layercut.compare(settings, tmp_path / "out").rows, key=lambda row: row.pair
    )
    assert first.dropped == second.dropped
    n_read = second.dropped[0] + 1  # up to the layer behind the cut; then every layer is read
    assert first.seconds["recover"] < 100
    assert second.seconds["recover"] > 100 * n_read


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
    monkeypatch.setattr("layercut.comparison.runner.SHARED_BYTES", 0)
    apart = layercut.compare(settings, tmp_path / "apart")
    assert n_shared < len(walked) - n_shared
    assert timeless(shared) == timeless(apart)


def test_a_second_call_goes_on_behind_the_rows_that_are_there(
    settings: dict[str, Any], tmp_path: Path
):
    whole = layercut.compare(settings, tmp_path / "whole")
    parts = tmp_path / "parts"
    layercut.compare({**settings, "drop_layers": [1], "methods": ["sleb"]}, parts)
    first = (parts / "rows.jsonl").read_bytes()
    result = layercut.compare(settings, parts)
    assert (parts / "rows.jsonl").read_bytes().startswith(first)
    assert timeless(result) == timeless(whole)
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
    for before, after in zip(timeless(first), timeless(second), strict=True):
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
    # A norm behind the down-projection: no map can be folded into the weights.
    settings["model"] = str(save_tiny(tmp_path / "olmo2", "olmo2"))
    settings["methods"] = ["ours", "shortgpt", "block-influence+projection"]
    result = layercut.compare(settings, tmp_path / "out")
    reasons = {(row.method, row.layers): row.reason for row in result.rows}
    assert reasons["shortgpt", 1] is None
    assert reasons["ours", 2] is None
    assert "norm" in reasons["block-influence+projection", 1]
    assert html.escape(reasons["block-influence+projection", 1]) in (
        tmp_path / "out/report.html"
    ).read_text().replace("&#39;", "&#x27;")


def test_a_bug_in_a_method_is_not_swallowed(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr("layercut.comparison.runner.fit_repair", broken)
    with pytest.raises(ZeroDivisionError):
        layercut.compare(settings, tmp_path / "out")


def test_layer_losses_that_fail_leave_the_rest(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = plans.score_layers

    def failing(view: Any, batches: Any, scoring: MethodCall) -> Any:
        if scoring.name == "perplexity":
            raise NumericsError("the loss is nan.")
        return original(view, batches, scoring)

    monkeypatch.setattr(plans, "score_layers", failing)
    settings |= {"methods": ["shortgpt"], "drop_layers": [1], "layer_losses": True}
    result = layercut.compare(settings, tmp_path / "out")
    assert result.truth is None
    assert result.rows[0].reason is None
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
    assert timeless(result) == timeless(whole)
