"""Dropping as many layers as a perplexity budget allows."""

from __future__ import annotations

import math

import pytest

from layercut import budget
from layercut.errors import DataError, PlanError
from layercut.evaluation.perplexity import mean_loss
from layercut.models.view import DecoderView
from layercut.selection import Request
from layercut.types import CalibrationBatches

LOWEST = {"strategy": "lowest", "request": Request(scoring="block-influence"), "recovery": "none"}


def test_the_largest_size_within_the_budget(view: DecoderView, batches: CalibrationBatches):
    everything, _, _ = budget.prune_within(view, batches, max_perplexity_ratio=1e9, **LOWEST)
    assert len(everything.dropped) == 4  # six layers, a quarter of them always stays
    ratios = everything.trials
    within = sorted(ratios.values())[0] * 1.0001
    if within <= 1:
        pytest.skip("random weights got better without layers")
    plan, _, _ = budget.prune_within(view, batches, max_perplexity_ratio=within, **LOWEST)
    assert plan.trials[len(plan.dropped)] <= within
    assert all(ratio > within for size, ratio in plan.trials.items() if size > len(plan.dropped))


def test_trials_are_measured_on_sequences_set_aside(view: DecoderView, batches: CalibrationBatches):
    plan, _, patch = budget.prune_within(view, batches, max_perplexity_ratio=1e9, **LOWEST)
    _, judging = budget.split(batches)
    assert judging.input_ids.equal(batches.input_ids[3:4])
    dense = mean_loss(view, judging.input_ids, 1)
    with view.skipping(plan.dropped), view.patched(patch.tensors):
        pruned = mean_loss(view, judging.input_ids, 1)
    assert plan.trials[len(plan.dropped)] == pytest.approx(math.exp(pruned - dense), rel=1e-5)


def test_split_keeps_fitting_and_judging_apart(batches: CalibrationBatches):
    fitting, judging = budget.split(batches)
    assert fitting.n_sequences + judging.n_sequences == batches.n_sequences
    assert judging.n_sequences == 1


def test_a_budget_that_no_plan_meets_is_an_error(view: DecoderView, batches: CalibrationBatches):
    with pytest.raises(PlanError, match=r"no plan meets max_perplexity_ratio 1e-09: dropping one"):
        budget.prune_within(view, batches, max_perplexity_ratio=1e-9, **LOWEST)


def test_too_few_sequences_to_set_any_aside(view: DecoderView, batches: CalibrationBatches):
    few = CalibrationBatches(batches.input_ids[:3], 2, 2, "few", "few")
    with pytest.raises(DataError, match="3 calibration sequences are too few to hold any out"):
        budget.prune_within(view, few, max_perplexity_ratio=2.0, **LOWEST)
