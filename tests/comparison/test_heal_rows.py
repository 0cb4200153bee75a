"""Entries that are healed, and the dense model beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import layercut
from comparisons import comparison_of
from layercut.comparison.store import Store
from layercut.errors import NumericsError, OutputError
from layercut.training.heal_trainer import HealTrainer


@pytest.fixture
def settings(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    return comparison_of(tiny_llama, tmp_path)


def test_a_heal_is_a_row_of_its_own_and_dense_is_healed_beside_it(
    settings: dict[str, Any], tmp_path: Path
):
    heal = {"steps": 2, "seq_len": 16, "batch_size": 2, "held_out": 2, "evaluations": 1}
    settings |= {"methods": ["shortgpt", "block-influence+ghost"], "drop_layers": [2]}
    settings |= {"heal": heal, "heal_methods": ["shortgpt"]}
    result = layercut.compare(settings, tmp_path / "out")
    rows = {(row.method, row.layers): row for row in result.rows}
    assert set(rows) == {
        ("dense, healed 2 steps", 0),
        ("shortgpt", 2),
        ("shortgpt, healed 2 steps", 2),
        ("block-influence+ghost", 2),
    }
    healed = rows["shortgpt, healed 2 steps", 2]
    assert rows["dense, healed 2 steps", 0].ratios(result.dense) == {"fox": 1.0}
    pruned = rows["shortgpt", 2]
    assert healed.dropped == pruned.dropped
    assert healed.evaluation.n_parameters == pruned.evaluation.n_parameters
    assert healed.seconds["heal"] == healed.heal["train_seconds"] > 0
    before = (tmp_path / "out/rows.jsonl").read_bytes()
    layercut.compare(settings, tmp_path / "out")
    assert (tmp_path / "out/rows.jsonl").read_bytes() == before


def test_a_heal_that_learns_the_text_trains_the_dense_model_too(
    settings: dict[str, Any], tmp_path: Path
):
    heal = {"steps": 2, "seq_len": 16, "batch_size": 2, "held_out": 2, "evaluations": 1}
    settings |= {"methods": ["shortgpt"], "drop_layers": [2], "heal": {**heal, "label_weight": 1.0}}
    result = layercut.compare(settings, tmp_path / "out")
    healed = {row.method: row for row in result.rows}["dense, healed 2 steps, 100 % labels"]
    assert healed.heal["n_steps"] == 2
    assert healed.ratios(result.dense)["fox"] != 1.0


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
        {row.method: row for row in found.rows}["shortgpt, healed 6 steps"]
        for found in (result, whole)
    )
    assert healed.heal["resumed_at"] == 2
    assert healed.heal["losses"] == expected.heal["losses"]
    assert healed.ratios(result.dense) == expected.ratios(whole.dense)


def test_a_heal_that_failed_is_tried_again(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    heal = {"steps": 2, "seq_len": 16, "batch_size": 2, "held_out": 2, "evaluations": 1}
    settings |= {"methods": ["shortgpt"], "drop_layers": [2], "heal": heal}

    def fail(*_: Any, **__: Any) -> None:
        raise NumericsError("the held-out loss is nan at step 1.")

    with monkeypatch.context() as patched:
        patched.setattr("layercut.training.heal.heal", fail)
        first = layercut.compare(settings, tmp_path / "out")
    failed = {row.method: row for row in first.rows}["shortgpt, healed 2 steps"]
    assert failed.reason == "the held-out loss is nan at step 1."
    second = layercut.compare(settings, tmp_path / "out")
    healed = {row.method: row for row in second.rows}["shortgpt, healed 2 steps"]
    assert healed.reason is None
    assert healed.heal["settings"]["steps"] == healed.heal["n_steps"] == 2
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
