"""Scores from a journal: those of the layers that were skipped, with the gradients behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from layercut.engine.file_journal import open_journal
from layercut.gradients.log import GradientLog, LoggedWeight
from layercut.models.view import DecoderView
from layercut.registry import Method, MethodCall, MethodOptions
from layercut.scoring.recorded_scorer import RecordedScorer
from layercut.spool import Spool
from layercut.types import CalibrationBatches, LayerScores

NAME = "model.layers.2.mlp.down_proj.weight"


def log_of_two_steps() -> GradientLog:
    """One weight of rank 2, (3, 5): rows of 2·5 + 3·2 numbers, of three steps two recorded."""
    log = GradientLog(steps=3)
    log.weights = {NAME: LoggedWeight(2, 4.0, (2, 5), (3, 2), start=0)}
    log.n_layers, log.n_steps = 6, 2
    log.rows = Spool(3, 16)
    log.rows.write(0, torch.randn(3, 16, generator=torch.manual_seed(0)))
    return log


def scoring_of(log: Any, calls: list[frozenset[int]]) -> MethodCall:
    def score(view: DecoderView, *_: Any) -> LayerScores:
        calls.append(view.skipped)
        values = tuple(float(layer + 10 * len(view.skipped)) for layer in range(6))
        return LayerScores(values, n_targets=7, gradient_log=log)

    return MethodCall("scoring", "own", Method(), MethodOptions(), score)


def test_every_round_is_scored_once(view: DecoderView, batches: CalibrationBatches, tmp_path: Path):
    calls: list[frozenset[int]] = []
    scoring = scoring_of(None, calls)
    found = []
    for _ in range(2):
        with open_journal(tmp_path / "out.progress", {"model": "tiny"}, {}) as journal:
            scorer = RecordedScorer(journal)
            for skipped in ((), (3,)):
                with view.skipping(skipped):
                    found.append(scorer(view, batches, scoring))
    assert calls == [frozenset(), frozenset({3})]
    assert found[2:] == found[:2]
    assert found[3].values == (10.0, 11.0, 12.0, None, 14.0, 15.0)


def test_gradients_come_back_where_a_recovery_reads_them(
    view: DecoderView, batches: CalibrationBatches, tmp_path: Path
):
    calls: list[frozenset[int]] = []
    log = log_of_two_steps()
    for keeps in (False, True, True):
        folder = tmp_path / str(keeps)
        with open_journal(folder, {"model": "tiny"}, {}) as journal:
            found = RecordedScorer(journal, keeps)(view, batches, scoring_of(log, calls))
    assert len(calls) == 2
    again = found.gradient_log
    assert isinstance(again, GradientLog)
    assert again is not log
    assert torch.equal(again.elementwise(NAME), log.elementwise(NAME))
    assert again.layer_scores("norm") == log.layer_scores("norm")


@pytest.mark.parametrize("log", [None, object()])
def test_gradients_that_no_file_holds_are_made_again(
    view: DecoderView, batches: CalibrationBatches, tmp_path: Path, log: Any
):
    calls: list[frozenset[int]] = []
    for _ in range(2):
        with open_journal(tmp_path / "out.progress", {"model": "tiny"}, {}) as journal:
            found = RecordedScorer(journal, True)(view, batches, scoring_of(log, calls))
        assert found.gradient_log is log
    assert len(calls) == 2
