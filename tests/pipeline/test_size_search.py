"""Dropping as many layers as a perplexity budget allows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from layercut.engine.loss import mean_loss
from layercut.errors import DataError, NumericsError, PlanError
from layercut.models.view import DecoderView
from layercut.pipeline import size_search
from layercut.registry import resolve
from layercut.selection.select import PlanOfSize, Request
from layercut.types import CalibrationBatches, Evidence, PruningPlan

SCORING = resolve("scoring", "block-influence")
LOWEST = {
    "request": Request(scoring=SCORING, strategy="lowest"),
    "recovery": resolve("recovery", "none"),
}


def test_the_largest_size_within_the_budget(view: DecoderView, batches: CalibrationBatches):
    everything, _, _ = size_search.prune_within(view, batches, max_perplexity_ratio=1e9, **LOWEST)
    assert len(everything.dropped) == 4  # six layers, a quarter of them always stays
    ratios = everything.trials
    within = sorted(ratios.values())[0] * 1.0001
    if within <= 1:
        pytest.skip("random weights got better without layers")
    plan, _, _ = size_search.prune_within(view, batches, max_perplexity_ratio=within, **LOWEST)
    assert plan.trials[len(plan.dropped)] <= within
    assert all(ratio > within for size, ratio in plan.trials.items() if size > len(plan.dropped))


def test_trials_are_measured_on_sequences_set_aside(view: DecoderView, batches: CalibrationBatches):
    plan, _, patch = size_search.prune_within(view, batches, max_perplexity_ratio=1e9, **LOWEST)
    _, held_out = size_search.split(batches)
    assert held_out.input_ids.equal(batches.input_ids[3:4])
    dense = mean_loss(view, held_out.input_ids, 1)
    with view.skipping(plan.dropped), view.patched(patch.tensors):
        pruned = mean_loss(view, held_out.input_ids, 1)
    assert plan.trials[len(plan.dropped)] == pytest.approx(math.exp(pruned - dense), rel=1e-5)


def test_split_keeps_fitting_and_held_out_apart(batches: CalibrationBatches):
    fitting, held_out = size_search.split(batches)
    assert fitting.n_sequences + held_out.n_sequences == batches.n_sequences
    assert held_out.n_sequences == 1


def test_every_eighth_sequence_is_set_aside():
    ids = torch.arange(17)[:, None].expand(17, 4)
    fitting, held_out = size_search.split(CalibrationBatches(ids, 2, 2, "numbers", "0"))
    assert held_out.input_ids[:, 0].tolist() == [7, 15]
    assert fitting.input_ids[:, 0].tolist() == [*range(7), *range(8, 15), 16]


def refuse_from(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan of ``limit`` layers or more."""
    original = size_search.plan_sizes

    def plan_sizes(*arguments: Any) -> PlanOfSize:
        choose = original(*arguments)

        def chosen(size: int) -> tuple[PruningPlan, Evidence]:
            if size >= limit:
                raise PlanError(f"no plan of {size} layers")
            return choose(size)

        return chosen

    monkeypatch.setattr(size_search, "plan_sizes", plan_sizes)


def test_a_size_without_a_plan_counts_as_too_large(
    view: DecoderView, batches: CalibrationBatches, monkeypatch: pytest.MonkeyPatch
):
    refuse_from(2, monkeypatch)
    plan, _, _ = size_search.prune_within(view, batches, max_perplexity_ratio=1e9, **LOWEST)
    assert len(plan.dropped) == 1
    assert list(plan.trials) == [1]


def test_no_plan_of_any_size_is_an_error_with_its_reason(
    view: DecoderView, batches: CalibrationBatches, monkeypatch: pytest.MonkeyPatch
):
    refuse_from(1, monkeypatch)
    with pytest.raises(PlanError, match=r"not one layer can be dropped: no plan of 1 layers"):
        size_search.prune_within(view, batches, max_perplexity_ratio=1e9, **LOWEST)


def test_protecting_every_layer_is_an_error(view: DecoderView, batches: CalibrationBatches):
    request = Request(scoring=SCORING, strategy="lowest", protect=frozenset(range(6)))
    with pytest.raises(PlanError, match=r"no layer of 6 may be dropped: 6 are protected"):
        size_search.prune_within(
            view, batches, max_perplexity_ratio=2.0, **(LOWEST | {"request": request})
        )


def test_a_loss_that_is_not_finite_is_an_error(view: DecoderView, batches: CalibrationBatches):
    view.model.lm_head.weight.data.fill_(math.inf)
    with pytest.raises(NumericsError, match="the evaluation loss is nan"):
        mean_loss(view, batches.input_ids, 2)


def test_a_budget_that_no_plan_meets_is_an_error(view: DecoderView, batches: CalibrationBatches):
    with pytest.raises(PlanError, match=r"no plan meets max_perplexity_ratio 1e-09: dropping one"):
        size_search.prune_within(view, batches, max_perplexity_ratio=1e-9, **LOWEST)


def test_too_few_sequences_to_set_any_aside(view: DecoderView, batches: CalibrationBatches):
    few = CalibrationBatches(batches.input_ids[:3], 2, 2, "few", "few")
    with pytest.raises(DataError, match="3 calibration sequences are too few to hold any out"):
        size_search.prune_within(view, few, max_perplexity_ratio=2.0, **LOWEST)
