"""Turning scores into plans."""

from __future__ import annotations

import functools

import pytest
import torch

from layercut.errors import PlanError
from layercut.models.view import DecoderView
from layercut.scoring.score import score
from layercut.selection.bounds import check_request
from layercut.selection.methods.lowest import choose_lowest
from layercut.selection.select import select as select_by
from layercut.types import CalibrationBatches

select = functools.partial(select_by, strategy="lowest", scoring="gradmap")


def test_lowest_by_hand():
    # ranked: 2 (0.1), 0 (0.3), 4 (0.5), 1 (0.9); the cut is between 0.3 and 0.5 of a range of 0.8
    chosen, margin = choose_lowest([0.3, 0.9, 0.1, None, 0.5], 2)
    assert chosen == [0, 2]
    assert margin == pytest.approx(0.2 / 0.8)


def test_ties_keep_the_lower_index():
    assert choose_lowest([1.0, 0.5, 0.5, 0.5], 1)[0] == [3]
    assert choose_lowest([1.0, 1.0], 1) == ([1], None)


def test_protected_layers_are_passed_over():
    assert choose_lowest([0.1, 0.2, 0.3], 1, protect=frozenset({0}))[0] == [1]


def test_one_shot_drops_the_lowest_scores(view: DecoderView, batches: CalibrationBatches):
    values = score(view, batches, method="gradmap").values
    expected = sorted(sorted(range(6), key=lambda i: values[i])[:2])
    plan, evidence = select(view, batches, rounds="one-shot", drop_layers=2)
    assert list(plan.dropped) == expected
    assert len(plan.rounds) == len(evidence.scores) == 1


def test_rounds_score_again_without_the_dropped_layer(
    view: DecoderView, batches: CalibrationBatches
):
    plan, _ = select(view, batches, rounds="each", drop_layers=2)
    first, second = plan.rounds
    assert sum(v is None for v in first.scores) == 0
    assert [i for i, v in enumerate(second.scores) if v is None] == list(first.dropped)
    with view.skipping(first.dropped):
        assert second.scores == score(view, batches, method="gradmap").values
    assert plan.fingerprint
    assert not view.skipped


def test_given_layers_are_not_scored(view: DecoderView, batches: CalibrationBatches):
    plan, evidence = select(view, batches, drop=[4, 1])
    assert plan.dropped == (1, 4)
    assert plan.method == "given"
    assert evidence.scores == ()


def test_selection_leaves_the_model_alone(
    view: DecoderView, batches: CalibrationBatches, ids: torch.Tensor
):
    before = view.model(ids).logits
    select(view, batches, drop_layers=3)
    assert torch.equal(view.model(ids).logits, before)


def test_fraction_is_rounded_to_the_nearest_number():
    assert check_request(30, drop_fraction=0.2) == 6
    assert check_request(6, drop_fraction=0.4) == 2


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"drop_layers": 0}, "cannot drop 0 of 8 layers: nothing would change"),
        ({"drop_layers": 8}, "cannot drop 8 of 8 layers: 0 are protected and min_keep=2 allows 6"),
        ({"drop_layers": 7}, "min_keep=2 allows 6. Lower drop_layers"),
        ({"drop_layers": 5, "protect": [0, 1, 2, 3]}, "4 are protected and min_keep=2 allows 4"),
        ({"drop": []}, "cannot drop 0 of 8"),
        ({"drop": [8]}, "names layer 8, but the model's layers are 0 to 7"),
        ({"drop": [-1]}, "names layer -1"),
        ({"drop": [3, 3]}, "names layer 3 twice"),
        ({"protect": [9], "drop_layers": 1}, "selection.protect names layer 9"),
        ({"drop": [2], "protect": [2]}, "layer 2 is to be dropped and protected"),
        ({"drop_fraction": 0.01}, "cannot drop 0 of 8"),
    ],
)
def test_impossible_requests_are_refused(request_: dict, message: str):
    with pytest.raises(PlanError, match=message):
        check_request(8, **request_)
